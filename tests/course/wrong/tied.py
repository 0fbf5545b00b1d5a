"Wrong answers to puzzle tied, and the hint that each must get."

import torch.nn.functional as F
from torch import nn

from megatron_edu.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_edu.tensor_parallel.embedding import VocabParallelEmbedding
from megatron_edu.tensor_parallel.mappings import copy_to_tp


class Right(nn.Module):
    "With parts to be replaced."

    def __init__(self, vocabulary, hidden, group):
        super().__init__()
        self.group = group
        self.wte = VocabParallelEmbedding(vocabulary, hidden, group=group)
        self.ln = nn.LayerNorm(hidden)

    def table(self):
        return self.wte.weight

    def look_up(self, ids):
        return self.wte(ids)

    def enter(self, x):
        return copy_to_tp(x, self.group)

    def forward(self, ids, targets):
        logits = F.linear(self.enter(self.ln(self.look_up(ids))), self.table())
        return vocab_parallel_cross_entropy(logits, targets, group=self.group).mean()


class NoOutputHalf(Right):
    def table(self):
        return self.wte.weight.detach()


class NoLookupHalf(Right):
    def look_up(self, ids):
        return self.wte(ids).detach()


class NoF(Right):
    def enter(self, x):
        return x


class SumsTheTable(Right):
    def table(self):
        return copy_to_tp(self.wte.weight, self.group)


class GivesEachLoss(Right):
    def forward(self, ids, targets):
        logits = F.linear(self.enter(self.ln(self.look_up(ids))), self.table())
        return vocab_parallel_cross_entropy(logits, targets, group=self.group)


WRONG = [
    ("half", NoOutputHalf),
    ("half", NoLookupHalf),
    ("partial", NoF),
    ("summed", SumsTheTable),
    ("shape", GivesEachLoss),
]

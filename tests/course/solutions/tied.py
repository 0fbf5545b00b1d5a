import torch.nn.functional as F
from torch import nn

from megatron_edu.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_edu.tensor_parallel.embedding import VocabParallelEmbedding
from megatron_edu.tensor_parallel.mappings import copy_to_tp


class Tied(nn.Module):
    "The smallest language model: one table looks words up and gives the logits."

    def __init__(self, vocabulary, hidden, group):
        super().__init__()
        self.group = group
        self.wte = VocabParallelEmbedding(vocabulary, hidden, group=group)
        self.ln = nn.LayerNorm(hidden)

    def forward(
        self,
        ids,        # (b, s): tokens
        targets,    # (b, s): the tokens that follow
    ):              # scalar: mean loss, equal on every rank
        # rows of the table, the layer norm, logits by the same table, the mean of the losses
        x = self.ln(self.wte(ids))
        logits = F.linear(copy_to_tp(x, self.group), self.wte.weight)
        return vocab_parallel_cross_entropy(logits, targets, group=self.group).mean()

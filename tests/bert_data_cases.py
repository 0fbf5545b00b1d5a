"A sentence file whose tokens say where they stand, for tests of BERT samples."

import numpy as np
from tokenizers import models

from megatron_edu.data.token_file import TokenFile
from megatron_edu.data.token_writer import TokenFileWriter
from megatron_edu.data.wordpiece import SPECIAL, WordPiece, uncased


def numbered_wordpiece(size: int, every: int = 0) -> WordPiece:
    "Tokens w5, w6, ...; with `every`, each of its multiples goes on with the word before it."
    marks = ["##" if every and i % every == 0 else "" for i in range(size)]
    vocab = [*SPECIAL, *(f"{marks[i]}w{i}" for i in range(len(SPECIAL), size))]
    numbers = {token: i for i, token in enumerate(vocab)}
    return WordPiece(uncased(models.WordPiece(numbers, unk_token="[UNK]")))


def numbered_file(prefix, documents, start: int = 5) -> TokenFile:
    "Documents of sentences of these sizes; the tokens are start, start + 1, ..."
    with TokenFileWriter(prefix, 2**31) as writer:
        for sizes in documents:
            for size in sizes:
                writer.append(range(start, start + size))
                writer.end_sequence()
                start += size
            writer.end_document()
    return TokenFile(prefix)


def random_file(prefix, seed: int, longest: int = 30, documents: int = 25) -> TokenFile:
    "Documents of 0 to 11 sentences, a few of them long."
    chance = np.random.default_rng(seed)
    counts = chance.integers(0, 12, size=documents)
    return numbered_file(prefix, [chance.integers(1, longest, size=n).tolist() for n in counts])

"Texts that a tokenizer must bear."

import random


def any_unicode(seed: int, length: int = 200) -> str:
    "Any characters at all, half of them from the first 256, without the halves of surrogate pairs."
    chance = random.Random(seed)
    codes = (chance.randrange(chance.choice([256, 0x110000])) for _ in range(length))
    return "".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)


def word_soup(seed: int, length: int = 400) -> str:
    "What the word pattern of GPT-2 has rules for: spaces, digits, apostrophes, line ends, marks."
    chance = random.Random(seed)
    parts = ["word", "it's", "we'll", "42", "é", "漢字", "_", "...", "!", " ", "  ", "\n"]
    parts += ["\n\n", "\t", "\u00a0", "\u2003", "\x1f", "\u200f", "<|endoftext|>", "'", "🙂"]
    return "".join(chance.choice(parts) + " " * (chance.random() < 0.5) for _ in range(length))

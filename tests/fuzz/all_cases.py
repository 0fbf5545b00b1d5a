"All cases, kind by kind."

from fuzz import (  # noqa: F401
    huggingface,
    options,
    runs,
    targets,
    texts,
    token_files,
    tokenizer_files,
)
from fuzz.cases import CASES

__all__ = ["CASES"]

"""Which tensors of a model have one row a token."""

import re
from collections.abc import Mapping
from typing import Final

from solera_core.architecture import is_embedding, is_head, layer_of, vocab_size
from solera_core.checkpoint import Checkpoint, TensorInfo

__all__ = ["table_rows", "vocabulary_tensors"]

_OUTSIDE: Final = re.compile(
    r"(^|\.)(embed\w*|\w+_embeddings?|embeddings?|wte|shared|(lm_)?head(\.linear|\.decoder)?|output(_layer)?"
    r"|predictions(\.decoder)?|vocab_\w+)\.(weight|bias)$"
)
_INSIDE: Final = re.compile(r"\.(embed_tokens|shared_head\.head|lm_head)\.(weight|bias)$")  # multi-token prediction
_OTHER: Final = re.compile(r"vision|visual|image|video|audio|speech|patch|position|token_type|norm|\.\d+\.", re.I)
_PARTIAL: Final = "embed_tokens_per_layer"  # Gemma 3n: with fewer rows than the embedding


def table_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding, else of the head; 0 where there is no table of tokens."""
    for is_table in (is_embedding, is_head):
        for name, info in checkpoint.tensors.items():
            if is_table(name) and info.shape:
                return info.shape[0]
    rows = vocab_size(checkpoint.config) or 0
    return rows if any(_has_rows(name, info, rows) for name, info in checkpoint.tensors.items()) else 0


def vocabulary_tensors(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Embeddings, output heads, their biases, and what else has a name of that kind and as many rows."""
    rows = table_rows(checkpoint)
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if (info.shape and (is_embedding(name) or is_head(name) or _PARTIAL in name)) or _has_rows(name, info, rows)
    }


def _has_rows(name: str, info: TensorInfo, rows: int) -> bool:
    if not info.shape or info.shape[0] != rows:
        return False
    if layer_of(name) is not None:
        return _INSIDE.search(name) is not None
    return _OUTSIDE.search(name) is not None and not _OTHER.search(name)

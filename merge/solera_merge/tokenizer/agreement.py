"""Whether the output's tokenizer splits a model's texts as the model's own does, measured on sample texts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from solera_merge.tokenizer.read import ModelTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["disagreement"]

_TEXTS: Final = (
    "The cask gives the spirit its colour, and the years give it its name.",
    "He said: “It's 3.5 °C; we'll see whether they're right!”",
    "    def add(self, a: int, b: int) -> int:\n        return a + b  # not 2*a\n",
    '{"name": "solera", "casks": [1, 22, 333], "open": false}',
    "1234567 + 89 = 1234656\t(two tabs)\t\n\n\n# Heading\n\n- item\n- item",
    "Der Küfer öffnet das Faß; où est l'élève? ¿Dónde está el niño?",
    "Быстрая лиса, 敏捷的狐狸, 素早い狐, الثعلب السريع, तेज़ लोमड़ी, 🦊🥃",
    "ANTIDISESTABLISHMENTARIANISM, supercalifragilistic, x_train[:, 0], https://example.org/a?b=c",
)
_WORDS: Final = 400  # tokens of the model's own vocabulary, spread evenly, each a text by itself


def disagreement(own: ModelTokenizer, output: ModelTokenizer) -> str | None:
    """How many of the sample texts the two split differently, with an example; None where they agree on all.

    The texts are the ones above (prose, code, numbers, several scripts) and tokens of the model's own vocabulary.
    Special tokens in front and behind are left out.
    """
    mine, theirs = own.load(), output.load()
    texts = [*_TEXTS, *_words(mine, own.vocabulary)]
    split = [
        [encoding.tokens for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for tokenizer in (mine, theirs)
    ]
    different = [(t, a, b) for t, a, b in zip(texts, *split, strict=True) if a != b]
    if not different:
        return None
    text, a, b = different[0]
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    example = f"{text[:40]!r}: {a[at : at + 5]} by its own, {b[at : at + 5]}"
    return f"{len(different)} of {len(texts)} sample texts are split differently ({example})"


def _words(tokenizer: "Tokenizer", vocabulary: Mapping[str, int]) -> list[str]:
    ids = sorted(vocabulary.values())
    chosen = ids[:: max(1, -(-len(ids) // _WORDS))]
    words = tokenizer.decode_batch([[i] for i in chosen], skip_special_tokens=True)
    return [word for word in dict.fromkeys(words) if word and "\ufffd" not in word]

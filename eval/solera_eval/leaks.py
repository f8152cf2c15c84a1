"""Does the training text hold the evaluation items? An evaluation of what was learned by heart measures memory.

Two kinds of overlap are reported:

    document   a training document is the very item (equal content hash)
    ngram      13 consecutive words of the item occur in a training document; of an item shorter than that, all of it
               (items of fewer than 4 words are only compared as documents: they would match by chance)

Words are runs of letters or digits, and single other signs, in lower case: spacing and line ends do not hide a leak.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from solera_core.data import DataSource, Document, Text, read_documents
from solera_eval.config import SuiteConfig
from solera_eval.suite import Suite, TextItem, load_suites

__all__ = ["NGRAM_WORDS", "Leak", "find_leaks", "leaks_between"]

NGRAM_WORDS = 13
_SHORTEST = 4
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Leak:
    """One evaluation item found in the training text: where, and how much of it (share of its n-grams)."""

    task: str
    item: str
    kind: Literal["document", "ngram"]
    training_document: str
    share: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def find_leaks(training: Iterable[Document], suite: Suite, *, ngram_words: int = NGRAM_WORDS) -> list[Leak]:
    """Every item of the suite that overlaps with the training documents, in the suite's order; one entry an item.

    The items are indexed (they are few) and the training documents streamed (they are many). `training_document` is
    the first document in which anything of the item was found.
    """
    if ngram_words < _SHORTEST:
        raise ValueError(f"n-grams of {ngram_words} words match by chance; use at least {_SHORTEST}")
    items = [(task.name, item) for task in suite.tasks for item in task.items]
    same: dict[str, list[int]] = {}
    grams: dict[tuple[str, ...], list[int]] = {}  # n-gram -> items it is in
    heads: dict[tuple[str, ...], set[int]] = {}  # its first words -> lengths of the n-grams that begin so
    totals = [0] * len(items)
    for i, (_, item) in enumerate(items):
        if isinstance(item, TextItem):
            same.setdefault(item.document.id, []).append(i)
        words = _words(item.text)
        length = min(ngram_words, len(words))
        if length < _SHORTEST:
            continue
        for gram in {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}:
            grams.setdefault(gram, []).append(i)
            heads.setdefault(gram[:_SHORTEST], set()).add(length)
            totals[i] += 1
    exact: dict[int, str] = {}
    first: dict[int, str] = {}
    found: dict[int, set[tuple[str, ...]]] = {}
    for document in training:
        for i in same.get(document.id, ()):
            exact.setdefault(i, document.id)
        words = _words(_text_of(document))
        for at in range(len(words) - _SHORTEST + 1):
            for length in heads.get(tuple(words[at : at + _SHORTEST]), ()):
                gram = tuple(words[at : at + length])
                for i in grams.get(gram, ()):
                    first.setdefault(i, document.id)
                    found.setdefault(i, set()).add(gram)
    leaks: list[Leak] = []
    for i, (task, item) in enumerate(items):
        if i in exact:
            leaks.append(Leak(task, item.id, "document", exact[i], 1.0))
        elif i in first:
            leaks.append(Leak(task, item.id, "ngram", first[i], len(found[i]) / totals[i]))
    return leaks


def leaks_between(
    sources: DataSource | Sequence[DataSource], suites: Sequence[str | SuiteConfig], *, base_dir: Path
) -> list[Leak]:
    """`find_leaks` from references: training sources as recipes give them, suites as files or inline."""
    return find_leaks(read_documents(sources, base_dir=base_dir), load_suites(suites, base_dir=base_dir))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _text_of(document: Document) -> str:
    if isinstance(document.content, Text):
        return document.content.prompt + document.content.completion
    return "\n".join(text for _, text in document.content.turns)

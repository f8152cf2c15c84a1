"""Documents to batches: cut, shuffled, grouped, padded. All of it a pure function of (text, seed, epoch, index).

A document never shares a row with another. Two ways would be exact: packing several into one row under a
block-diagonal mask, or one piece a row, padded on the right. Padding it is: under causal attention nothing looks to
the right, so a padded row needs no mask at all, is exact for every causal architecture (also those whose code ignores
packed position ids), and takes the fast causal path of the attention kernel. Its cost is the padding, and grouping by
length within an optimizer step keeps that at a few per cent; the loss reads learned positions only.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from solera_core.data import Encoded
from solera_core.errors import DataError

__all__ = ["Corpus", "Cursor", "MicroBatch", "Order", "Piece", "build_corpus", "cut", "micro_batches"]

_PADDING_SHARE: Final = 1 / 32
"""Padding a micro-batch may hold before a new one is begun, as a share of its limit: about what one more costs."""


@dataclass(frozen=True)
class Piece:
    """One row to be: the model reads ids[:-1]; where learned[t], it learns ids[t + 1] from ids[: t + 1].

    Attributes:
        ids: (n + 1,) tokens.
        learned: (n,) which predictions count.
        route: who teaches it (an index into the teachers; 0 where there is none).
        group: index of its data source.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    route: int
    group: int

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.ids) - 1


def cut(encoded: Encoded, longest: int, *, bos: int | None) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """`(ids, learned)` of the pieces of a document; of each, the model reads at most `longest` (2 or more) tokens.

    Every target of the document is learned in exactly one piece. A later piece begins with the token before its first
    target, so that the first target too is predicted from text; where the document begins with BOS, so does every
    piece, because models lean on it (attention rests there). Pieces with nothing to learn (a long prompt) are left out.
    """
    ids, targets = encoded.ids, encoded.targets
    head = ids[:1] if bos is not None and ids[:1] == (bos,) else ()
    pieces: list[tuple[tuple[int, ...], tuple[bool, ...]]] = []
    begin = 0
    while begin < len(ids) - 1:
        prefix = head if begin else ()
        end = min(begin + longest - len(prefix), len(ids) - 1)  # the last token learned in this piece
        learned = (False,) * len(prefix) + targets[begin + 1 : end + 1]
        if any(learned):
            pieces.append((prefix + ids[begin : end + 1], learned))
        begin = end
    return pieces


@dataclass(frozen=True)
class Corpus:
    """All pieces of the training (or held-out) text.

    Attributes:
        pieces: in order of the documents.
        weights: of each group, how often it is seen in one epoch.
        documents: number of documents.
        cut_documents: how many of them were longer than a sequence.
        tokens: of all pieces together.
    """

    pieces: Sequence[Piece]
    weights: Sequence[float]
    documents: int
    cut_documents: int

    @property
    def tokens(self) -> int:
        """Tokens the model reads in all pieces."""
        return sum(p.tokens for p in self.pieces)


def build_corpus(
    groups: Sequence[Sequence[tuple[Encoded, int]]], weights: Sequence[float], longest: int, *, bos: int | None
) -> Corpus:
    """Cut encoded documents, given as (document, route) by group, into pieces of at most `longest` tokens.

    Raises:
        DataError: nothing to learn in any document.
    """
    pieces: list[Piece] = []
    cut_documents = 0
    for group, documents in enumerate(groups):
        for encoded, route in documents:
            found = cut(encoded, longest, bos=bos)
            cut_documents += len(encoded.ids) - 1 > longest
            pieces += [Piece(np.array(i, np.int32), np.array(t, np.bool_), route, group) for i, t in found]
    documents_count = sum(len(g) for g in groups)
    if not pieces:
        raise DataError(
            f"{documents_count} documents, but nothing in them to learn: every one is too short or all prompt"
        )
    return Corpus(pieces, tuple(weights), documents_count, cut_documents)


@dataclass(frozen=True)
class Cursor:
    """A place in the endless stream of pieces: `index` into the order of `epoch`."""

    epoch: int = 0
    index: int = 0


class Order:
    """The endless stream of pieces: a fresh shuffle every epoch, keyed by (seed, epoch) and nothing else.

    A group of weight w is in every epoch floor(w) times, and a random share w - floor(w) of it once more.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus = corpus
        self._seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices into `corpus.pieces`, in the order in which they are seen."""
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=_key(self._seed, epoch)))
            groups = np.array([p.group for p in self._corpus.pieces])
            weights = np.array(self._corpus.weights)[groups]
            copies = np.floor(weights) + (random.random(len(groups)) < weights - np.floor(weights))
            if not copies.any():
                copies[:] = 1  # tiny weights throughout: weights are relative
            self._order = random.permutation(np.repeat(np.arange(len(groups)), copies.astype(np.int64)))
            self._epoch = epoch
        return self._order

    def take(self, cursor: Cursor, tokens: int) -> tuple[list[Piece], Cursor]:
        """Pieces from `cursor` on until they hold at least `tokens` tokens, and the place behind them."""
        taken: list[Piece] = []
        epoch, index = cursor.epoch, cursor.index
        while tokens > 0:
            order = self.epoch(epoch)
            if index == len(order):
                epoch, index = epoch + 1, 0
                continue
            piece = self._corpus.pieces[order[index]]
            taken.append(piece)
            tokens -= piece.tokens
            index += 1
        return taken, Cursor(epoch, index)


def _key(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"batches/{seed}/{epoch}".encode()).digest()[:16], "little")


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once: pieces of one route.

    Attributes:
        inputs: (B, T) tokens, padded on the right with token 0.
        positions: (N,) indices into the B * T positions, of what is learned.
        targets: (N,) tokens to be predicted there.
        route: who teaches.
    """

    inputs: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    route: int


def micro_batches(pieces: Sequence[Piece], limit: int) -> list[MicroBatch]:
    """Group pieces by route, sort by length, and cut where padding, or `limit` in all, would be exceeded."""
    return list(_micro_batches(pieces, limit))


def _micro_batches(pieces: Sequence[Piece], limit: int) -> Iterator[MicroBatch]:
    for route in sorted({p.route for p in pieces}):
        rows: list[Piece] = []
        padding = 0
        for piece in sorted((p for p in pieces if p.route == route), key=lambda p: -p.tokens):  # stable
            if rows:
                waste = rows[0].tokens - piece.tokens
                if (len(rows) + 1) * rows[0].tokens > limit or padding + waste > limit * _PADDING_SHARE:
                    yield _collate(rows)
                    rows, padding, waste = [], 0, 0
                padding += waste
            rows.append(piece)
        yield _collate(rows)


def _collate(rows: Sequence[Piece]) -> MicroBatch:
    length = rows[0].tokens
    inputs = np.zeros((len(rows), length), np.int64)
    nexts = np.zeros((len(rows), length), np.int64)
    learned = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        inputs[i, : row.tokens] = row.ids[:-1]
        nexts[i, : row.tokens] = row.ids[1:]
        learned[i, : row.tokens] = row.learned
    positions = np.flatnonzero(learned)
    return MicroBatch(inputs, positions, nexts.reshape(-1)[positions], rows[0].route)

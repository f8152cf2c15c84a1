"""Text of every expert's domain, split into a part to fit on and a part held out, as token sequences."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solera_core.data import DataSource, Document, encode, read_documents
from solera_core.errors import ConfigError, DataError

__all__ = ["Domain", "Sequences", "read_domains", "tokenize"]


@dataclass(frozen=True)
class Domain:
    """The documents of one expert's domain, in an order that a hash decides.

    Attributes:
        name: of the expert.
        fit: documents for the statistics.
        held_out: documents that the fit never sees.
    """

    name: str
    fit: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True)
class Sequences:
    """Token ids of one domain, cut into sequences; `targets` says which tokens are scored.

    All sequences have the asked length except the last, which may be shorter; or every document has its own.
    `documents`: the first token of every document among all tokens, and the document (`file:line`).
    """

    ids: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[bool, ...], ...]
    documents: tuple[tuple[int, str], ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(map(len, self.ids))

    @property
    def scored(self) -> int:
        """Tokens that a likelihood counts: targets, less the first of every sequence, which nothing predicts."""
        return sum(sum(sequence[1:]) for sequence in self.targets)

    def documents_of(self, token: int) -> str:
        """The documents in the sequence of a token, for messages: what is wrong in one spoils its sequence."""
        begin = end = 0
        for ids in self.ids:
            begin, end = end, end + len(ids)
            if token < end:
                break
        edges = [*(first for first, _ in self.documents), self.tokens]
        spans = zip(edges, edges[1:], self.documents, strict=False)
        found = [document for first, stop, (_, document) in spans if first < end and stop > begin]
        return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else "?"


def read_domains(
    data: Mapping[str, Sequence[DataSource]],
    *,
    base_dir: Path,
    holdout: float,
    seed: int,
    key: str = "router.data",
) -> tuple[list[Domain], list[str]]:
    """Read and split the calibration text; also returns warnings.

    The hash of (seed, content) decides the order and so the split: file order does not matter, a sample is drawn from
    the whole of a file, and copies of a document stay on one side. `key` is what messages call the data.

    Raises:
        DataError: a domain with a single document (nothing could be held out), or two domains with the same text.
    """
    domains: list[Domain] = []
    seen: dict[str, str] = {}
    warnings: list[str] = []
    for name, sources in data.items():
        unique = {document.id: document for document in read_documents(list(sources), base_dir=base_dir)}
        where = f"{key}.{name} ({', '.join(source.path for source in sources)})"
        if len(unique) < 2:
            raise DataError(
                f"{where}: only 1 document; at least 2 are needed, one to fit on and one to hold out "
                "(plain text is cut into documents by `chunk_chars`)"
            )
        ordered = sorted(unique.values(), key=lambda document: _rank(document, seed))
        cut = min(max(round(holdout * len(ordered)), 1), len(ordered) - 1)
        domains.append(Domain(name, tuple(ordered[cut:]), tuple(ordered[:cut])))
        for other in dict.fromkeys(seen.values()):
            shared = sum(seen.get(id_) == other for id_ in unique)
            if shared == len(unique):
                raise DataError(f"{where}: all of it is also the text of {other!r}, so no router can tell them apart")
            if shared:
                warnings.append(f"{where}: {shared} of {len(unique)} documents are also the text of {other!r}")
        seen |= dict.fromkeys(unique, name)
    return domains, warnings


def tokenize(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    limit: int,
    sequence_tokens: int,
    where: str,
    apart: bool = False,
) -> Sequences:
    """Documents end to end, each with its BOS and EOS, up to `limit` tokens, cut into sequences.

    With `apart` no sequence holds tokens of two documents.

    Raises:
        DataError: fewer than 2 tokens in all.
        ConfigError: the tokenizer makes ids that it should not (a document without tokens).
    """
    ids: list[int] = []
    targets: list[bool] = []
    begins: list[tuple[int, str]] = []
    for document in documents:
        if len(ids) >= limit:
            break
        begins.append((len(ids), document.where or document.id))
        encoded = encode(document, tokenizer, add_eos=True)
        if not encoded.ids:
            raise ConfigError(f"{where}: document {document.id} has no tokens; is this the model's tokenizer?")
        ids += encoded.ids
        targets += encoded.targets
    ids, targets = ids[:limit], targets[:limit]
    if len(ids) < 2:
        raise DataError(f"{where}: {len(ids)} tokens are too few; a next token needs at least 2")
    edges = [first for first, _ in begins] if apart else [0]
    cuts = [
        (start, min(start + sequence_tokens, end))
        for first, end in zip(edges, [*edges[1:], len(ids)], strict=True)
        for start in range(first, end, sequence_tokens)
    ]
    return Sequences(
        tuple(tuple(ids[start:stop]) for start, stop in cuts),
        tuple(tuple(targets[start:stop]) for start, stop in cuts),
        tuple(begins),
    )


def _rank(document: Document, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{document.id}".encode()).digest()

"""From the recipe's sources to a corpus."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solera_core.data import DataSource, Document, encode, read_documents
from solera_core.errors import DataError
from solera_core.progress import Progress
from solera_distill.batches import Corpus, build_corpus
from solera_distill.heldout import HeldOut

__all__ = ["Groups", "heldout_corpus", "read_groups", "training_corpus"]


@dataclass(frozen=True)
class Groups:
    """Documents by data source, and how often each source is seen."""

    documents: Sequence[Sequence[Document]]
    weights: Sequence[float]

    @property
    def all(self) -> list[Document]:
        """The documents of all sources."""
        return [d for group in self.documents for d in group]


def read_groups(sources: Sequence[DataSource], base_dir: Path) -> Groups:
    """Read the documents of every source. Raises DataError as `read_documents`."""
    return Groups([read_documents(s, base_dir=base_dir) for s in sources], [s.weight for s in sources])


def training_corpus(
    groups: Groups, tokenizer: Any, longest: int, *, route: Callable[[Document], int], progress: Progress
) -> Corpus:
    """Encode and cut the training text; what is cut is said."""
    encoded = [[(encode(d, tokenizer, add_eos=True), route(d)) for d in group] for group in groups.documents]
    corpus = build_corpus(encoded, groups.weights, longest, bos=tokenizer.bos_token_id)
    if corpus.cut_documents:
        progress.note(
            f"{corpus.cut_documents} of {corpus.documents} documents are longer than {longest} tokens and are cut into "
            "pieces"
        )
    return corpus


def heldout_corpus(groups: Groups, training: Groups, tokenizer: Any, longest: int) -> HeldOut:
    """Encode and cut the held-out text; domains are kept apart.

    Raises:
        DataError: a document is also in the training text, so the figure would mean nothing.
    """
    seen = {d.id for d in training.all}
    if shared := [d.where or f"document {d.id}" for d in groups.all if d.id in seen]:
        raise DataError(
            f"eval_data: {len(shared)} of its {len(groups.all)} documents are also in the training data (the first is "
            f"{shared[0]}); leave them out of one, for example with `skip` and `limit`"
        )
    domains = list(dict.fromkeys(d.domain or "text" for d in groups.all))
    encoded = [
        [(encode(d, tokenizer, add_eos=True), domains.index(d.domain or "text")) for d in group]
        for group in groups.documents
    ]
    return HeldOut(build_corpus(encoded, [1.0] * len(encoded), longest, bos=tokenizer.bos_token_id), domains)

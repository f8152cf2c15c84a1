"""One vocabulary for all models of a merge: the output's tokenizer, and every model seen through it.

    tokenizers of the models -> tokenizer of the output -> origin of every row -> views of the models

Where all models have the output's vocabulary already, nothing is moved, and the tokenizer's files are copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from solera_core.checkpoint import Checkpoint
from solera_core.views import Derived, view
from solera_merge.config import MergeConfig
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.runs import Part, Run
from solera_merge.targets import lies_before
from solera_merge.tokenizer.agreement import disagreement
from solera_merge.tokenizer.config import TokenizerConfig
from solera_merge.tokenizer.models import Tokenizers, donor_of, read_tokenizers
from solera_merge.tokenizer.output import fills_of, output_rows, output_tokenizer
from solera_merge.tokenizer.permute import permuted
from solera_merge.tokenizer.read import ModelTokenizer
from solera_merge.tokenizer.rows import ZERO, Origins, origins, own_rows
from solera_merge.tokenizer.tensors import vocabulary_tensors

__all__ = ["Alignment", "align"]


@dataclass(frozen=True)
class Alignment:
    """What the recipe's tokenizer makes of the merge.

    Attributes:
        models: as the merge sees them, all with the output's vocabulary.
        donor: number of the model whose tokenizer the output's is, or is made from.
        tokenizers: of the models; None where the recipe asks for no tokenizer (or the donor has none).
        output: the output's tokenizer, where it is not the donor's.
        rows: of the output's embedding, where `tokenizers` are there.
        warnings: what a careful person would want to know.
    """

    models: Models
    donor: int
    tokenizers: Tokenizers | None = None
    output: ModelTokenizer | None = None
    rows: int | None = None
    warnings: tuple[str, ...] = ()


def align(config: MergeConfig, models: Models, parts: Sequence[Part]) -> Alignment:
    """The models as seen through the tokenizer that the recipe asks for.

    Raises:
        ConfigError: it asks for a model or a token that is not there.
        CheckpointError: a tokenizer cannot be read, or not be combined with the others.
    """
    wanted = config.wanted_tokenizer
    where = "tokenizer_source" if config.tokenizer is None else "tokenizer.source"
    donor = donor_of(None if wanted is None else wanted.source, models, where)
    warnings: list[str] = []
    all_ = None if wanted is None else read_tokenizers(models, donor, warnings)
    if wanted is None or all_ is None:
        return Alignment(models, donor)
    output = output_tokenizer(wanted, all_, warnings)
    rows = output_rows(output, wanted, all_.rows[donor])
    tables = _tables(wanted, parts, all_, output, rows, warnings)
    seen = tuple(_seen(c, tables[i]) for i, c in enumerate(models.checkpoints))
    warnings += _other_splits(all_, output)
    changed = output.content != all_.own[donor].content
    aligned = replace(models, checkpoints=seen)
    return Alignment(aligned, donor, all_, output if changed else None, rows, tuple(warnings))


def _tables(
    wanted: TokenizerConfig,
    parts: Sequence[Part],
    all_: Tokenizers,
    output: ModelTokenizer,
    rows: int,
    warnings: list[str],
) -> list[dict[str, tuple[Derived, str]]]:
    """By model and name: the tables whose rows are moved, each with a digest of where they come from.

    Raises:
        ConfigError: see `fills_of`.
        CheckpointError: a row is to be taken from a model that lacks the tensor.
    """
    fills = fills_of(wanted.tokens, output, all_)
    ids = list(output.vocabulary.values())
    tokens = np.zeros(rows, np.bool_)
    tokens[ids] = True
    average_from = None if wanted.pad_to_multiple_of is None else max(ids, default=-1) + 1
    own = {i: own_rows(t.vocabulary, output.vocabulary, all_.rows[i], rows) for i, t in all_.own.items()}
    spare = {i: _spare(t, all_.rows[i]) for i, t in all_.own.items()}
    checkpoints = dict(enumerate(all_.models.checkpoints))
    tables: list[dict[str, tuple[Derived, str]]] = [{} for _ in checkpoints]
    found: dict[tuple[tuple[int, ...], int | None], dict[int, Origins]] = {}
    problems = Problems()
    for name in dict.fromkeys(name for c in checkpoints.values() for name in vocabulary_tensors(c)):
        run = _run_of(name, parts)
        sources = tuple(s.model for s in run.sources if name in checkpoints[s.model].tensors)
        if len({checkpoints[i].tensors[name].shape[1:] for i in sources}) != 1:
            continue  # not part of the output, or the plan refuses its shapes
        key = (sources, run.named_base if run.named_base in sources else None)
        if key not in found:
            found[key] = origins(
                sources,
                own,
                spare,
                tokens=tokens,
                base=key[1],
                donor=all_.donor,
                fills=fills,
                average_from=average_from,
            )
            warnings += _without_row(name, found[key], output, set(fills))
        for i, rows_of in found[key].items():
            if rows_of.is_identity(i, all_.rows[i]):
                continue
            if lacking := [all_.models.ref(m) for m in rows_of.givers() if name not in checkpoints[m].tensors]:
                problems.checkpoint(
                    f"{checkpoints[i].tensors[name].file}: rows of {name!r} are to come from {some(lacking)}, which "
                    "lacks it"
                )
                continue
            tables[i][name] = permuted(name, i, checkpoints, rows_of), _digest(rows_of)
    problems.raise_any()
    return tables


def _run_of(name: str, parts: Sequence[Part]) -> Run:
    """What makes a table of the output: the first run of its part, or the last one for what lies behind the layers."""
    part = next((p for p in parts if p.tower is None or name in p.tower.tensors), parts[0])
    return part.runs[0 if lies_before(name) else -1]


def _spare(tokenizer: ModelTokenizer, rows: int) -> npt.NDArray[np.bool_]:
    """Which rows of a model have no token."""
    spare = np.ones(rows, np.bool_)
    spare[[i for i in tokenizer.vocabulary.values() if i < rows]] = False
    return spare


def _seen(checkpoint: Checkpoint, tables: dict[str, tuple[Derived, str]]) -> Checkpoint:
    if not tables:
        return checkpoint
    tensors = {name: tables[name][0] if name in tables else name for name in checkpoint.tensors}
    return view(checkpoint, tensors, what={"vocabulary": {name: digest for name, (_, digest) in tables.items()}})


def _digest(rows: Origins) -> str:
    hasher = blake3()
    for array in (rows.model, rows.row, rows.tokens):
        hasher.update(np.ascontiguousarray(array).tobytes())
    hasher.update(repr(sorted(rows.means.items())).encode())
    return f"blake3:{hasher.hexdigest()}"


def _without_row(name: str, found: dict[int, Origins], output: ModelTokenizer, asked: set[int]) -> list[str]:
    """A warning about tokens that get zeros although the recipe does not ask for that."""
    places = {int(k) for rows in found.values() for k in np.flatnonzero(rows.model == ZERO)} - asked
    if not places:
        return []
    names = [token for token, i in output.vocabulary.items() if i in places]
    return [
        f"{name!r}: {len(names)} tokens of the output are in none of the models that it is made of, and get zeros (in "
        f"an output head that is no low value): {some(sorted(names))}"
    ]


def _other_splits(all_: Tokenizers, output: ModelTokenizer) -> list[str]:
    """Warnings about models whose texts the output's tokenizer splits otherwise than their own does."""
    warnings: list[str] = []
    seen: dict[str, str | None] = {output.digest: None}
    for i, own in all_.own.items():
        if own.digest not in seen:
            seen[own.digest] = None if own.content == output.content else disagreement(own, output)
        if (how := seen[own.digest]) is not None:
            warnings.append(
                f"{own.file}: {how}. Every token keeps its embedding, but {all_.models.ref(i)!r} was not trained on "
                "texts that are split in this way"
            )
    return warnings

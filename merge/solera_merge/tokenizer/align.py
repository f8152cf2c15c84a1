"""One vocabulary for all models of a merge: the output's tokenizer, and every model seen through it.

    tokenizers of the models -> tokenizer of the output -> origin of every row -> views of the models

Where all models have the output's vocabulary already, nothing is moved, and the tokenizer's files are copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from solera_core.checkpoint import Checkpoint
from solera_core.views import Derived, view
from solera_merge.config import MergeConfig
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.runs import Part
from solera_merge.targets import lies_before
from solera_merge.tokenizer.agreement import disagreement
from solera_merge.tokenizer.models import Tokenizers, read_tokenizers
from solera_merge.tokenizer.output import fills_of, output_rows, output_tokenizer
from solera_merge.tokenizer.permute import permuted
from solera_merge.tokenizer.read import ModelTokenizer
from solera_merge.tokenizer.rows import ZERO, Origins, RowFill, origins, own_rows
from solera_merge.tokenizer.tensors import vocabulary_tensors

__all__ = ["Alignment", "align_vocabularies"]


@dataclass(frozen=True)
class Alignment:
    """What the recipe's tokenizer makes of the merge.

    Attributes:
        models: as the merge sees them, all with the output's vocabulary.
        donor: number of the model whose tokenizer the output's is, or is made from.
        tokenizers: of the models; None where the recipe asks for no tokenizer.
        output: the output's tokenizer, where it is not the donor's.
        rows: of the output's tables, where they are moved.
        warnings: what a careful person would want to know.
    """

    models: Models
    donor: int
    tokenizers: Tokenizers | None = None
    output: ModelTokenizer | None = None
    rows: int | None = None
    warnings: tuple[str, ...] = ()


def align_vocabularies(config: MergeConfig, models: Models, parts: Sequence[Part], donor: int) -> Alignment:
    """The models as seen through the tokenizer that the recipe asks for; `donor` gives it, or what it is made from.

    Raises:
        ConfigError: it asks for a model or a token that is not there.
        CheckpointError: a tokenizer cannot be read, or not be combined with the others; a table cannot be moved.
    """
    wanted = config.wanted_tokenizer
    if wanted is None:
        return Alignment(models, donor)
    warnings: list[str] = []
    all_ = read_tokenizers(models, donor, warnings)
    output = output_tokenizer(wanted, all_, warnings)
    rows = output_rows(output, wanted, all_.rows[donor])
    fills = fills_of(wanted.tokens, output, all_)
    changed = output if output.content != all_.own[donor].content else None
    warnings += _other_splits(all_, output)
    alike = all(own.vocabulary == output.vocabulary and all_.rows[i] == rows for i, own in all_.own.items())
    filled = wanted.pad_to_multiple_of is not None and rows > _end_of_tokens(output)  # with the mean
    if alike and not filled and not any(fill.force for fill in fills.values()):
        return Alignment(models, donor, all_, changed, None, tuple(warnings))
    tables = _tables(config, parts, all_, output, rows, fills, warnings)
    seen = tuple(_seen(c, tables[i]) for i, c in enumerate(models.checkpoints))
    return Alignment(replace(models, checkpoints=seen), donor, all_, changed, rows, tuple(warnings))


def _end_of_tokens(output: ModelTokenizer) -> int:
    """Rows from here on have no token."""
    return max(output.vocabulary.values(), default=-1) + 1


def _tables(
    config: MergeConfig,
    parts: Sequence[Part],
    all_: Tokenizers,
    output: ModelTokenizer,
    rows: int,
    fills: Mapping[int, RowFill],
    warnings: list[str],
) -> list[dict[str, tuple[Derived, str]]]:
    """By model and name: the tables whose rows are moved, each with a digest of where they come from.

    Raises:
        CheckpointError: a table has rows for some of the tokens only; a row is to be taken from a model that lacks the
            tensor.
    """
    wanted = config.wanted_tokenizer
    assert wanted is not None
    ids = list(output.vocabulary.values())
    tokens = np.zeros(rows, np.bool_)
    tokens[ids] = True
    average_from = None if wanted.pad_to_multiple_of is None else _end_of_tokens(output)
    own = {i: own_rows(t.vocabulary, output.vocabulary, all_.rows[i], rows) for i, t in all_.own.items()}
    checkpoints = dict(enumerate(all_.models.checkpoints))
    # A tokenizer that belongs to no model of the merge has no rows to give.
    spare = {i: _spare(t, all_.rows[i] if i in checkpoints else 0) for i, t in all_.own.items()}
    tables: list[dict[str, tuple[Derived, str]]] = [{} for _ in checkpoints]
    found: dict[tuple[tuple[int, ...], int | None], dict[int, Origins]] = {}
    problems = Problems()
    for name in dict.fromkeys(name for c in checkpoints.values() for name in vocabulary_tensors(c)):
        members, base = _made_of(name, config, parts, all_.models)
        sources = tuple(m for m in members if name in checkpoints[m].tensors)
        infos = {m: checkpoints[m].tensors[name] for m in sources}
        if len({info.shape[1:] for info in infos.values()}) != 1:
            continue  # not part of the output, or the plan refuses its shapes
        if short := [m for m in sources if infos[m].shape[0] != all_.rows[m]]:
            problems.checkpoint(
                f"{infos[short[0]].file}: {name!r} {infos[short[0]].shape} has other rows than the embedding "
                f"({all_.rows[short[0]]}), so it cannot be moved to another vocabulary; leave the tokenizer out (all "
                "models must have the same tokens then)"
            )
            continue
        key = (sources, base if base in sources else None)
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
                    f"{infos[i].file}: rows of {name!r} are to come from {some(lacking)}, which lacks it"
                )
                continue
            tables[i][name] = permuted(name, i, checkpoints, rows_of), _digest(rows_of)
    problems.raise_any()
    return tables


def _made_of(name: str, config: MergeConfig, parts: Sequence[Part], models: Models) -> tuple[list[int], int | None]:
    """The models that a table is merged from, and the base that the recipe names there, whether or not it is used.

    Tables before the layers belong to the first run of their part, the others to the last.
    """
    at = 0 if lies_before(name) else -1
    settings = list(config.parts.values())
    for i, part in enumerate(parts):
        if part.tower is not None and name not in part.tower.tensors:
            continue
        wanted = settings[i] if i < len(settings) else None  # behind them: what `towers` copies
        slices = None if wanted is None else wanted.slices
        ref = (slices[at].base_model if slices else None) or (wanted and wanted.base_model) or config.base_model
        return [source.model for source in part.runs[at].sources], None if ref is None else models.index[ref]
    return [], None


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

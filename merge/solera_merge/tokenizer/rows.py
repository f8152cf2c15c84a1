"""Where each embedding row of the output's vocabulary comes from, for each model of a merge.

As mergekit has it. A model that has a token gives its own row. For one that lacks it: the recipe's `source`; else the
row of the only model that has it; else the base's; else the mean of all that have it; else zeros.

Rows without a token are not mergekit's, which drops them: the model's own where it has no token there either, else the
donor's; behind those (`pad_to_multiple_of`) the mean of the model's rows that have a token (as in mergekit; see
nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["AVERAGE", "MEAN", "ZERO", "Origins", "RowFill", "origins", "own_rows"]

ZERO: Final = -1
MEAN: Final = -2
"""The mean of the rows in `Origins.means`."""
AVERAGE: Final = -3
"""The mean of the model's rows that have a token."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowFill:
    """What the recipe says about a token.

    Attributes:
        model: whose row; None: zeros.
        row: of that model.
        force: also for models that have the token.
    """

    model: int | None
    row: int
    force: bool


@dataclass(frozen=True)
class Origins:
    """For every row of one model's new table, where it comes from.

    Attributes:
        model: whose row it is, or ZERO, MEAN, AVERAGE. Shape [rows].
        row: its place there. Shape [rows].
        means: (model, row) of those that are averaged, by place in the new table.
        tokens: rows that have a token. Shape [rows].
    """

    model: Ints
    row: Ints
    means: Mapping[int, tuple[tuple[int, int], ...]]
    tokens: npt.NDArray[np.bool_]

    def is_identity(self, model: int, rows: int) -> bool:
        """Whether the new table is the model's own, of `rows` rows."""
        return (
            len(self.row) == rows
            and bool((self.model == model).all())
            and bool((self.row == np.arange(len(self.row))).all())
        )

    def givers(self) -> set[int]:
        """The models that rows come from."""
        found = {int(m) for m in np.unique(self.model) if m >= 0}
        return found | {model for rows in self.means.values() for model, _ in rows}


def own_rows(vocabulary: Mapping[str, int], output: Mapping[str, int], rows: int, size: int) -> Ints:
    """Place in the model's table of every token of the output, -1 where it has none. Shape [size].

    Args:
        vocabulary: of the model.
        output: vocabulary of the output.
        rows: of the model's table.
        size: rows of the output.
    """
    found = np.full(size, -1, np.int64)
    for token, i in output.items():
        if (own := vocabulary.get(token, rows)) < rows:
            found[i] = own
    return found


def origins(
    models: Sequence[int],
    own: Mapping[int, Ints],
    spare: Mapping[int, npt.NDArray[np.bool_]],
    *,
    tokens: npt.NDArray[np.bool_],
    base: int | None,
    donor: int,
    fills: Mapping[int, RowFill],
    average_from: int | None,
) -> dict[int, Origins]:
    """The origins for every one of the models that a tensor is merged from.

    Args:
        models: their numbers, in the order of the recipe.
        own: `own_rows` of each model.
        spare: by model (the donor too), which of its rows have no token. Shape [the model's rows].
        tokens: rows of the output that have a token. Shape [rows].
        base: the base, if it is one of the models.
        donor: whose tokenizer the output has.
        fills: what the recipe says, by place in the output.
        average_from: rows from here on that have no token get the average; None: none but those that the donor lacks.
    """
    size = len(tokens)
    has = np.stack([own[m] >= 0 for m in models])
    count = has.sum(axis=0)
    first = np.asarray(models)[has.argmax(axis=0)]
    shared_model = np.where(count == 0, ZERO, np.where(count == 1, first, MEAN))
    if base is not None:
        shared_model[(count > 1) & (own[base] >= 0)] = base
    shared_row = np.zeros(size, np.int64)
    for m in models:
        shared_row = np.where(shared_model == m, own[m], shared_row)
    forced = np.zeros(size, np.bool_)
    for place, fill in fills.items():
        shared_model[place] = ZERO if fill.model is None else fill.model
        shared_row[place] = fill.row
        forced[place] = fill.force
    found: dict[int, Origins] = {}
    for m in models:
        mine = (own[m] >= 0) & ~forced
        model, row = np.where(mine, m, shared_model), np.where(mine, own[m], shared_row)
        for place in np.flatnonzero(~tokens).tolist():
            averaged = average_from is not None and place >= average_from
            donors = [d for d in (m, donor) if place < len(spare[d]) and spare[d][place]]
            origin = (donors[0], place) if donors and not averaged else (AVERAGE, 0)
            model[place], row[place] = origin
        means = {
            place: tuple((k, int(own[k][place])) for k in models if own[k][place] >= 0)
            for place in np.flatnonzero(model == MEAN).tolist()
        }
        found[m] = Origins(model, row, means, tokens)
    return found

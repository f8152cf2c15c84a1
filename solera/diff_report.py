"""What `solera diff` shows of what it found: tables for a terminal, a picture for a page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from solera.heatmap import Panel, heat_map, heat_map_page
from solera_core.diff import Diff, kind_of, whole
from solera_core.errors import ConfigError
from solera_core.places import Place, place_of
from solera_core.strict import did_you_mean

__all__ = ["MEASURES", "check_picture", "measure_of", "picture", "print_diff"]

_PANELS: Final = 6  # pairs that have panels of their own; beyond, one panel shows their mean


@dataclass(frozen=True)
class Measure:
    """A figure that a picture can show.

    Attributes:
        title: beside the colour scale.
        key: among the figures of `Diff`.
        pairs: of two models' changes, not of one.
        reading: how to read it.
        show: its text.
    """

    title: str
    key: str
    pairs: bool
    reading: str
    show: Callable[[float], str]


def _plain(value: float) -> str:
    """At most four characters and a sign: `0.06`, `0.63`, `1.2`, `887`, `4e-3`."""
    if value == 0:
        return "0"
    if abs(value) < 0.0095:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{min(max(1 - math.floor(math.log10(abs(value))), 0), 2)}f}"


def _percent(value: float) -> str:
    return _plain(100 * value)


MEASURES: Final[Mapping[str, Measure]] = {
    "relative_change": Measure(
        "relative change, %",
        "relative_change",
        False,
        "How far each tensor moved from the base: |tau| / |W_0|.",
        _percent,
    ),
    "changed": Measure(
        "elements changed, %", "changed", False, "The share of each tensor that is not the base's.", _percent
    ),
    "rank": Measure(
        "effective rank of the change", "effective_rank", False, "How many directions each matrix changed in.", _plain
    ),
    "sign_conflict": Measure(
        "sign conflict, %",
        "sign_conflict",
        True,
        "Of the elements that both models change, the share moved in opposite directions: 50 is chance.",
        _percent,
    ),
    "cosine": Measure(
        "cosine of the changes", "cosine", True, "1: both models change a tensor alike; 0: unrelated changes.", _plain
    ),
}
"""What `--measure` may be."""


def measure_of(name: str | None, models: int, *, ranks: bool) -> Measure:
    """The figure to be shown: as asked for, else the sign conflict of several models or the change of one.

    Raises:
        ConfigError: no such figure, or not for so many models, or ranks that are not computed.
    """
    name = name or ("sign_conflict" if models > 1 else "relative_change")
    if name not in MEASURES:
        raise ConfigError(f"--measure: {name!r} is none{did_you_mean(name, MEASURES)}")
    measure = MEASURES[name]
    if measure.pairs and models < 2:
        raise ConfigError(f"--measure {name}: is about two models that change one base; give --base and two models")
    if measure.key == "effective_rank" and not ranks:
        raise ConfigError("--measure rank: needs --rank")
    return measure


def check_picture(file: Path) -> None:
    """Refuse a picture that could not be written.

    Raises:
        ConfigError: another ending than .svg or .html, or no such folder.
    """
    if file.suffix not in (".svg", ".html"):
        raise ConfigError(f"--picture {file}: pictures are written as .svg or .html (any browser turns them into .png)")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--picture {file}: there is no folder {file.parent}")


def picture(found: Diff, measure: Measure, file: Path) -> None:
    """Write the heat map, layer by kind."""
    names = _names(found)
    panels = _panels(found, measure, names)
    if len(found.models) == 1:
        title = f"{names[0]} against {_name(found.base)}"
    else:
        title = f"{', '.join(names)} as changes of {_name(found.base)}"

    def draw(width: int, css_class: str = "") -> str:
        return heat_map(
            panels,
            title=title,
            subtitle=measure.reading,
            measure=measure.title,
            format_value=measure.show,
            width=width,
            css_class=css_class,
        )

    text = (
        draw(1180) + "\n"
        if file.suffix == ".svg"
        else heat_map_page(draw(1180, "wide"), draw(412, "narrow"), title=title)
    )
    file.write_text(text, encoding="utf-8")


def _panels(found: Diff, measure: Measure, names: Sequence[str]) -> list[Panel]:
    if not measure.pairs:
        grids = [dict[Place, float | None]() for _ in names]
        for (place, i), row in found.totals(place_of).items():
            grids[i][place] = row[measure.key]
        return [Panel(name if len(names) > 1 else "", grid) for name, grid in zip(names, grids, strict=True)]
    pairs = list(combinations(range(len(names)), 2))
    by_pair = {pair: dict[Place, float | None]() for pair in pairs}
    for (place, i, j), row in found.pair_totals(place_of).items():
        by_pair[i, j][place] = row[measure.key]
    if len(pairs) <= _PANELS:
        return [Panel(f"{names[i]} and {names[j]}" if len(pairs) > 1 else "", grid) for (i, j), grid in by_pair.items()]
    places = list(dict.fromkeys(place for grid in by_pair.values() for place in grid))
    return [Panel(f"mean over {len(pairs)} pairs", {p: _mean([g.get(p) for g in by_pair.values()]) for p in places})]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _name(ref: str) -> str:
    """The last part of a directory; hub ids and stages as they are."""
    return Path(ref).name if ref.startswith(("/", ".", "~")) else ref


def _names(found: Diff) -> list[str]:
    short = [_name(ref) for ref in found.models]
    return short if len(set(short)) == len(short) else list(found.models)


def print_diff(found: Diff, *, top: int, measure: Measure) -> None:
    """Totals, every pair of models, kinds, and the tensors where the measure is largest."""
    from solera.console import print_rows, stdout_console

    console = stdout_console()
    names = _names(found)
    console.print(f"[bold]{_name(found.base)}[/bold] is the base (W_0); a change is tau = W - W_0", markup=True)
    print_rows(
        "models",
        [{"model": names[i], **_shown(row)} for (_, i), row in found.totals(whole).items()],
    )
    print_rows(
        "pairs: how their changes agree (0.5 is the sign conflict of unrelated changes)",
        [{"a": names[i], "b": names[j], **row} for (_, i, j), row in found.pair_totals(whole).items()],
    )
    print_rows("kinds of tensors", _kinds(found, names))
    if measure.pairs:
        rows = [row for row in found.pair_rows() if row[measure.key] is not None]
        keys = ["name", "a", "b", "cosine", "sign_conflict", "sign_conflict_mass"]
    else:
        rows = [row for row in found.rows() if row[measure.key] is not None]
        keys = [k for k in (rows[0] if rows else ()) if k not in ("layer", "kind", "elements", "identical")]
    rows.sort(key=lambda row: -row[measure.key])
    short = dict(zip(found.models, names, strict=True))
    shown = [
        {key: short.get(row[key], row[key]) if key in ("model", "a", "b") else row[key] for key in keys}
        for row in rows[: top or None]
    ]
    print_rows(f"tensors, largest {measure.key} first", _filled(shown))
    if len(shown) < len(rows):
        console.print(f"... and {len(rows) - len(shown)} more (--top 0, or all of them with --json)")
    odd = [row for row in found.rows() if row["relative_change"] is None or row["note"]]
    print_rows(
        "noted", [{key: row[key] for key in ("name", "model", "identical", "note")} for row in odd[: top or None]]
    )
    if top and len(odd) > top:
        console.print(f"... and {len(odd) - top} more (--top 0, or all of them with --json)")


def _kinds(found: Diff, names: Sequence[str]) -> list[dict[str, Any]]:
    totals, pairs = found.totals(kind_of), found.pair_totals(kind_of)
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(group for group, _ in totals):
        row: dict[str, Any] = {"kind": kind}
        for i, name in enumerate(names):
            figures = totals.get((kind, i), {})
            row[f"change {name}"] = figures.get("relative_change")
            row[f"rank {name}"] = figures.get("effective_rank")
        mine = [figures for (group, _, _), figures in pairs.items() if group == kind]
        row["cosine"] = _mean([figures["cosine"] for figures in mine])
        row["sign conflict"] = _mean([figures["sign_conflict"] for figures in mine])
        rows.append(row)
    return _filled(rows)


def _filled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without the columns that are empty everywhere."""
    keys = [key for key in (rows[0] if rows else ()) if any(row[key] not in (None, "") for row in rows)]
    return [{key: row[key] for key in keys} for row in rows]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}

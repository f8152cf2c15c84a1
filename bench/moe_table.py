"""The table of bench/moe.py: means with intervals over seeds, and verdicts on what was aimed at."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["report", "student_t"]

WITHIN = 1.05
"""A healed mixture shall lose at most 5 % of the specialists' mean nats a token."""
MERGEKIT = "mergekit-moe"
OURS = "fit "
TRUNK, BASE = "trunk: ", "base_model: "
"""In the names of mixtures, ours and mergekit's, whose trunk is not the base."""
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Rows = Mapping[str, Mapping[str, float]]
"""Column of the table -> domain -> nats a token."""


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's distribution; 1.96 beyond nine degrees of freedom."""
    return _T.get(freedom, 1.96)


def report(root: Path, tuned: Sequence[str]) -> None:
    """Print what `root` holds: one table and its verdicts for each way of tuning."""
    for way in tuned:
        files = sorted(root.glob(f"{way}-*/rows.json"))
        rows = {file.parent.name.removeprefix(f"{way}-"): json.loads(file.read_text()) for file in files}
        found: dict[str, Rows] = {seed: some for seed, some in rows.items() if "specialists" in some}  # else just begun
        if found:
            _one(way, found)
            _separability([file.parent for file in files])


def _one(way: str, found: Mapping[str, Rows]) -> None:
    seeds = list(found)
    title = {"ffn": "feed-forward networks alone", "full": "all weights"}[way]
    print(f"\nSpecialists that trained {title}; seeds {', '.join(seeds)}. Nats a token on test text.\n")
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    domains = list(next(iter(next(iter(found.values())).values())))
    print("| model | " + " | ".join(domains) + " | mean | above the specialists |")
    print("|---" * (len(domains) + 3) + "|")
    floor = _of(found, lambda rows: _mean(rows["specialists"]))
    for name in names:
        have = {seed: rows for seed, rows in found.items() if name in rows}
        cells = [_cell([rows[name][domain] for rows in have.values()], 2) for domain in domains]
        whole = _cell([_mean(rows[name]) for rows in have.values()], 3)
        above = _cell([100 * (_mean(rows[name]) / floor[seed] - 1) for seed, rows in have.items()], 1, " %")
        some = "" if len(have) == len(found) else f" ({len(have)} seeds)"
        print(f"| {name}{some} | " + " | ".join(cells) + f" | {whole} | {above} |")
    print()
    _verdicts(found, names)


def _verdicts(found: Mapping[str, Rows], names: Sequence[str]) -> None:
    theirs = [name for name in names if name.startswith(MERGEKIT)]
    ours = [name for name in names if name.startswith(OURS)]
    pairs = [(a, b) for a in ours for b in theirs]
    _better("every fit better than every mergekit-moe mode, all pairs", found, pairs)
    alike = [(a, b) for a, b in pairs if (TRUNK in a) == (BASE in b)]
    _better("the same, pairs of like trunks alone", found, alike)
    healed = [name for name in names if name.startswith("healed")]
    for name in healed:
        share = _of(found, _ratio(name, "specialists"))
        above = [100 * (value - 1) for value in share.values()]
        verdict = _verdict([WITHIN - value for value in share.values()])
        print(f"- {name} within 5 % of the specialists: {verdict}, {_cell(above, 1, ' %')} above them")
        gain = _of(found, _difference("control", name))
        verdict = _verdict(list(gain.values()))
        print(f"- {name} better than the dense control: {verdict}, by {_cell(list(gain.values()), 3)} nats")


def _better(aim: str, found: Mapping[str, Rows], pairs: Sequence[tuple[str, str]]) -> None:
    """Whether the first of every pair has the smaller loss, in the mean over seeds; those that have not are named."""
    gains = [(a, b, list(_of(found, _difference(b, a)).values())) for a, b in pairs]
    gains = [(a, b, values) for a, b, values in gains if values]
    lost = [(a, b, values) for a, b, values in gains if statistics.mean(values) <= 0]
    verdict = "not measured" if not gains else "missed" if lost else "held"
    print(f"- {aim}: {verdict}, {len(gains) - len(lost)} of {len(gains)} better on the mean")
    for a, b, values in lost:
        print(f"    - not: {a}, against {b}: {_cell(values, 3)}")


def _separability(folders: Sequence[Path]) -> None:
    """How well single tokens tell their domain: share of held-out tokens that a router's first choice sends right."""
    for name in ("ridge-k2", "logistic-k2", "prompts-k2"):
        files = [file for folder in folders if (file := folder / name / "solera.json").exists()]
        routers = [json.loads(file.read_text())["checks"]["router"] for file in files]
        shares = [zip(*router["route_accuracy"].values(), strict=True) for router in routers]
        by_layer = [[statistics.mean(layer) for layer in share] for share in shares]
        if by_layer:
            layers = [_cell([100 * seed[layer] for seed in by_layer], 0) for layer in range(len(by_layer[0]))]
            chance = 100 / len(routers[0]["route_accuracy"])
            print(f"- {name}: tokens sent right, % by layer: {', '.join(layers)} (chance: {chance:.0f})")


def _of(found: Mapping[str, Rows], value: Callable[[Rows], float]) -> dict[str, float]:
    """A figure by seed, of the seeds that have it."""
    result: dict[str, float] = {}
    for seed, rows in found.items():
        try:
            result[seed] = value(rows)
        except KeyError:  # this seed is not done
            continue
    return result


def _verdict(margins: Sequence[float]) -> str:
    """Of an aim that is reached where a margin, one a seed, is above 0."""
    if not margins:
        return "not measured"
    if statistics.mean(margins) <= 0:
        return "missed"
    if len(margins) == 1:
        return "held in the one seed"
    held = statistics.mean(margins) > _half(margins)
    return "held" if held else "held on the mean, not beyond the seeds' spread"


def _half(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of two or more."""
    return student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _difference(a: str, b: str) -> Callable[[Rows], float]:
    return lambda rows: _mean(rows[a]) - _mean(rows[b])


def _ratio(a: str, b: str) -> Callable[[Rows], float]:
    return lambda rows: _mean(rows[a]) / _mean(rows[b])


def _mean(by_domain: Mapping[str, float]) -> float:
    return statistics.mean(by_domain.values())


def _cell(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Mean, and half of its 95 % interval over the seeds."""
    if not values:
        return "-"
    centre = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return centre + unit
    return f"{centre} ± {_half(values):.{digits}f}{unit}"

"""Which target a MoE is written in: the exactness table, and the choice by engines."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from solera_core.errors import CheckpointError
from solera_merge.moe.families import PLAIN, WAY_OUT
from solera_merge.moe.targets import flex_olmo, granitemoe, granitemoeshared, mixtral, qwen2_moe, qwen3_moe
from solera_merge.moe.targets.target import Engine, Sizes, Target

__all__ = ["TARGETS", "choose", "exact_targets", "target_of"]

TARGETS: Final[dict[str, Target]] = {
    module.TARGET.name: module.TARGET
    for module in (mixtral, qwen3_moe, qwen2_moe, granitemoe, flex_olmo, granitemoeshared)
}
"""By model_type, in the order in which equals are preferred."""

_OLMOE: Final = (
    "target: olmoe cannot be exact for any family: it normalises queries and keys over all heads and has its norms "
    "before attention and feed-forward network; no dense family has both (OLMo-2 has its norms behind: use flex_olmo)"
)


def target_of(model_type: str) -> Target:
    """The target of a written MoE."""
    return TARGETS[model_type]


def exact_targets(fields: Mapping[str, Any]) -> list[Target]:
    """The targets that hold all of a dense model with these (resolved) fields."""
    return [target for target in TARGETS.values() if target.homeless(fields) is None]


def choose(
    asked: str, engines: Sequence[Engine], fields: Mapping[str, Any], sizes: Sizes, *, where: str
) -> tuple[Target, list[str]]:
    """The target, and warnings about engines that were asked for and will not compute the same.

    `auto`: of the exact ones that with the fewest unsupported, then the fewest approximate engines among those asked
    for, then the first in `TARGETS`.

    Args:
        asked: `auto` or a target's name.
        engines: those that shall run the MoE.
        fields: of the trunk, resolved.
        sizes: of the MoE.
        where: the trunk and its config.json, for messages.

    Raises:
        CheckpointError: naming the first field that has no home.
    """
    if asked == "olmoe":
        raise CheckpointError(f"{where}: {_OLMOE}")
    if asked != "auto":
        target = TARGETS[asked]
        if (feature := target.homeless(fields)) is not None:
            others = [other.name for other in exact_targets(fields)]
            hint = f"target {' or '.join(others)} has one" if others else WAY_OUT
            raise CheckpointError(f"{where}: {_said(fields, feature)}: no home in {target.title}; {hint}")
        _sharing([target], sizes, where, asked=asked)
        return target, _doubts(target, engines, fields, sizes)
    candidates = exact_targets(fields)
    if not candidates:
        raise CheckpointError(f"{where}: {_said(fields, _deepest(fields))}: no home in any MoE format; {WAY_OUT}")

    def cost(target: Target) -> tuple[int, int]:
        found = [v.verdict for v in target.verdicts(fields, sizes) if v.engine in engines]
        return found.count("unsupported"), found.count("approximate")

    target = min(_sharing(candidates, sizes, where), key=cost)  # the first of equals
    return target, _doubts(target, engines, fields, sizes)


def _sharing(targets: Sequence[Target], sizes: Sizes, where: str, *, asked: str | None = None) -> list[Target]:
    """Those with a shared expert, where one is to be written."""
    found = [target for target in targets if sizes.shared == 0 or target.shared is not None]
    if not found:
        with_one = " and ".join(target.name for target in TARGETS.values() if target.shared is not None)
        said = f"target {asked} has no shared expert" if asked else "no format that holds it has a shared expert"
        raise CheckpointError(
            f"{where}: shared: {said}; {with_one} have one" + ("" if asked else "; remove `shared`, or use `slim`")
        )
    return found


def _doubts(target: Target, engines: Sequence[Engine], fields: Mapping[str, Any], sizes: Sizes) -> list[str]:
    return [
        f"{verdict.engine} with target {target.name}: {verdict.verdict}: {verdict.why}"
        for verdict in target.verdicts(fields, sizes)
        if verdict.engine in engines and verdict.verdict != "exact"
    ]


def _deepest(fields: Mapping[str, Any]) -> str:
    """The feature that stops the target which comes nearest: the last of their first obstacles."""
    order = list(PLAIN)
    obstacles = [feature for target in TARGETS.values() if (feature := target.homeless(fields)) is not None]
    return max(obstacles, key=order.index)


def _said(fields: Mapping[str, Any], feature: str) -> str:
    value = fields[feature]
    return f"{feature} is {str(value).lower() if isinstance(value, bool) else repr(value)}"

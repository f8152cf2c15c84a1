"""The parameters of every output tensor, after precedence, gradients, filters and defaults."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from solera_core.errors import ConfigError
from solera_core.strict import did_you_mean
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import Method
from solera_merge.methods.signature import REQUIRED, Parameter
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.scope import SHARED_OVER_MODEL
from solera_merge.settings import evaluate, filters_of, gradients_of
from solera_merge.targets import Target

__all__ = ["check_filters", "long_gradients", "resolve"]


def resolve(config: MergeConfig, targets: Sequence[Target], models: Models) -> list[dict[str, Any]]:
    """For every target its parameters by name: one value, or a tuple with one value a model (the base left out).

    For each tensor and model the first level that has a value wins: source, slice, module, global, default. A level
    whose filters do not match falls through to the next. Filters see the name in the source for what belongs to one
    model, and the name in the output for what all share (as in mergekit).

    Raises:
        ConfigError: a required parameter without a value, a filter that matches nothing, weights that cancel, values
            that the method calls impossible, several densities of a model where its scope is the model.
    """
    problems = Problems()
    check_filters(config, {name for target in targets for name in (target.name, *target.inputs)}, problems)
    unset: dict[tuple[str, str, str | None], list[str]] = {}
    resolved: list[dict[str, Any]] = []
    for target in targets:
        values: dict[str, Any] = {}
        for name, parameter in target.run.method.parameters.items():
            shared = [*target.run.levels, config.parameters]
            if not parameter.per_model:
                values[name] = _lookup(parameter, shared, target.name, target.t)
                if values[name] is REQUIRED:
                    unset.setdefault((target.run.method.name, name, None), []).append(target.name)
                continue
            row: list[Any] = []
            for source, tensor in zip(target.run.sources, target.inputs, strict=True):
                if source.model == target.run.base:
                    continue
                row.append(_lookup(parameter, [source.parameters, *shared], tensor, target.t))
                if row[-1] is REQUIRED:
                    unset.setdefault((target.run.method.name, name, models.ref(source.model)), []).append(target.name)
            values[name] = tuple(row)
        resolved.append(values)
    for (called, name, ref), tensors in unset.items():
        whose = f" for {ref!r}" if ref is not None else ""
        which = "" if len(tensors) == len(targets) else f" (for {some(tensors)})"
        problems.config(f"parameters: {called} needs `{name}`{whose}{which}")
    problems.raise_any()
    for method in dict.fromkeys(target.run.method for target in targets):
        mine = [i for i, target in enumerate(targets) if target.run.method is method]
        of, found = [targets[i] for i in mine], [resolved[i] for i in mine]
        _check_weights(method, of, found, problems)
        _check_values(method, of, found, problems)
        _check_scope(method, of, found, models, problems)
    problems.raise_any()
    return resolved


def _lookup(parameter: Parameter, levels: Iterable[Mapping[str, Any]], tensor: str, t: float) -> Any:
    for level in levels:
        if parameter.name in level:
            try:
                value = evaluate(level[parameter.name], parameter, tensor, t)
            except ValueError as e:
                raise ConfigError(f"parameters.{parameter.name}: {e} (for {tensor!r})") from e
            if value is not None:
                return value
    return parameter.default


def check_filters(config: MergeConfig, names: Collection[str], problems: Problems) -> None:
    """A filter that is part of no tensor's name is a misspelling: without this it would silently select nothing.

    Args:
        config: the recipe.
        names: of the tensors; where there are none, nothing is said.
        problems: where such filters are noted.
    """
    levels = [config.parameters]
    for part in config.parts.values():
        levels += [part.parameters, *(m.parameters for m in part.models or ())]
        for output in part.slices or ():
            levels += [output.parameters, *(s.parameters for s in output.sources)]
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for level in levels:
        for parameter, setting in level.items():
            for wanted in filters_of(setting):
                if names and not any(wanted in name for name in names):
                    problems.config(
                        f"parameters.{parameter}: filter {wanted!r} matches no tensor{did_you_mean(wanted, parts)}"
                    )


def long_gradients(config: MergeConfig, targets: Sequence[Target]) -> list[str]:
    """Warnings about gradients with more values than there are layers: some of the values are that of none."""
    places: dict[int, set[float]] = {}
    levels: dict[int, Mapping[str, Any]] = {}
    for target in targets:
        for level in (config.parameters, *target.run.levels, *(s.parameters for s in target.run.sources)):
            levels[id(level)] = level
            places.setdefault(id(level), set()).add(target.t)
    return [
        f"parameters.{name}: the gradient {list(gradient)} has {len(gradient)} values for {len(places[key])} layers: "
        "it is read at the layers' places, and values between them are passed over"
        for key, level in levels.items()
        for name, setting in level.items()
        for gradient in gradients_of(setting)
        if len(gradient) > len(places[key])
    ]


def _check_weights(
    method: Method, targets: Sequence[Target], resolved: Sequence[Mapping[str, Any]], problems: Problems
) -> None:
    """Refuse weights that make the result meaningless: all zero, or cancelling where they are divided by their sum."""
    if "weight" not in method.parameters:
        return
    switch = "normalize_weights" if "normalize_weights" in method.parameters else "normalize"
    zero: list[str] = []
    cancelling: list[str] = []
    for target, values in zip(targets, resolved, strict=True):
        weights: tuple[float, ...] = values["weight"]
        size = sum(map(abs, weights))
        if size == 0:
            zero.append(target.name)
        elif values.get(switch, method.normalizes) and abs(sum(weights)) <= 1e-8 * size:
            cancelling.append(target.name)
    if cancelling:
        who, remedy = (switch, f" or set `{switch}: false`") if switch in method.parameters else (method.name, "")
        problems.config(
            f"parameters.weight: the weights of {some(cancelling)} sum to 0, and {who} divides by their sum; "
            f"change a weight{remedy}"
        )
    if zero and (method.base != "required" or len(zero) == len(targets)):
        result = "the base itself" if method.base == "required" else "zero"
        problems.config(f"parameters.weight: all weights of {some(zero)} are 0, so the result would be {result}")


def _check_values(
    method: Method, targets: Sequence[Target], resolved: Sequence[Mapping[str, Any]], problems: Problems
) -> None:
    """Refuse values that the method calls impossible together."""
    if method.check is None:
        return
    found: dict[str, list[str]] = {}
    for target, values in zip(targets, resolved, strict=True):
        try:
            method.check(values)
        except ValueError as e:
            found.setdefault(str(e), []).append(target.name)
    for message, names in found.items():
        problems.config(f"parameters: {message} (for {some(names)})")


def _check_scope(
    method: Method,
    targets: Sequence[Target],
    resolved: Sequence[Mapping[str, Any]],
    models: Models,
    problems: Problems,
) -> None:
    """One threshold for all tensors of a model can't have several densities."""
    for name in SHARED_OVER_MODEL if "scope" in method.parameters else ():
        found: dict[str, dict[float, str]] = {}
        for target, values in zip(targets, resolved, strict=True):
            if values["scope"] == "model" and name in values:
                others = [models.ref(s.model) for s in target.run.sources if s.model != target.run.base]
                for ref, value in zip(others, values[name], strict=True):
                    found.setdefault(ref, {}).setdefault(value, target.name)
        for ref, by_value in found.items():
            if len(by_value) > 1:
                examples = " and ".join(f"{value:g} for {tensor!r}" for value, tensor in list(by_value.items())[:2])
                problems.config(
                    f"parameters.{name}: `scope: model` needs one value for all tensors of {ref!r}, found {examples}; "
                    "give it one number, or set `scope: tensor`"
                )

"""The runs of a recipe: consecutive layers of the output that are made of the same models in the same way.

`models:` is one run over everything; every entry of `slices:` is one. With `modules:` and `towers:` each of them has
runs of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from solera_core.architecture import text_config
from solera_core.towers import Tower, find_tower, layer_count
from solera_merge.config import MergeConfig, OutputModule
from solera_merge.methods.catalogue import METHODS, Method
from solera_merge.models import Models
from solera_merge.problems import Problems, some

__all__ = ["Part", "Run", "Source", "parts_of"]


@dataclass(frozen=True)
class Source:
    """One model of a run.

    Attributes:
        model: position among all models.
        first: its first layer in this run.
        parameters: its own.
        where: its place in the recipe.
    """

    model: int
    first: int
    parameters: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Run:
    """Layers of the output that are made in one way.

    Attributes:
        sources: the models, the base among them where the method needs one.
        base: position of that base among all models, or None.
        length: number of layers.
        method: how they are made.
        levels: parameters of the slice and of the module, before the global ones.
    """

    sources: tuple[Source, ...]
    base: int | None
    length: int
    method: Method
    levels: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Part:
    """A part of the output: the whole model, or one of its towers.

    Attributes:
        tower: as the config's owner has it; None: the whole model.
        whole: the one run spans all its layers; else they are numbered anew.
        runs: in the order of the layers.
    """

    tower: Tower | None
    whole: bool
    runs: tuple[Run, ...]


Entry: TypeAlias = tuple[str, tuple[int, int] | None, Mapping[str, Any]]  # reference, layer range, parameters


def parts_of(config: MergeConfig, models: Models, problems: Problems) -> list[Part]:
    """The parts of the output with their runs, the base added as a source where the method needs it.

    What `towers:` does not name is copied from the owner, as parts of its own.

    Problems are noted: modules that are unknown, named twice or left out; runs with a wrong number of models, the same
    model twice, no base where one is needed, parameters on the base, unequal or impossible layer ranges.
    """
    parts: list[Part] = []
    taken: dict[str, str] = {}
    towers = models.towers[models.owner]
    key = "towers" if config.towers is not None else "modules"
    for name, wanted in config.parts.items():
        tower = None
        if name is not None:
            tower = find_tower(towers, name)
            if tower is None:
                problems.config(f"{key}.{name}: {models.ref(models.owner)!r} has no such module; {_listing(towers)}")
                continue
            if tower.name in taken:
                problems.config(
                    f"{key}: {taken[tower.name]!r} and {name!r} are the same tower ({tower.name}); name it once"
                )
                continue
            taken[tower.name] = name
        where = "" if name is None else f"{key}.{name}."
        runs = _runs(where, wanted, tower, config, models, problems)
        parts.append(Part(tower, wanted.models is not None, tuple(runs)))
    left = [] if config.parts.keys() == {None} else [tower for tower in towers if tower.name not in taken]
    if left and config.modules is not None and len(taken) == len(config.parts):
        problems.config(
            f"modules: {some([tower.name for tower in left], len(left))} of {models.ref(models.owner)!r} would be left "
            "out; name every module, or use `towers`, which copies the others from base_model"
        )
    copy = Run((Source(models.owner, 0, {}, ""),), None, 0, METHODS["passthrough"], ({"scale": 1.0},))
    return [*parts, *(Part(tower, True, (copy,)) for tower in left)]


def _listing(towers: Sequence[Tower]) -> str:
    return "it has " + ", ".join(tower.name for tower in towers)


def _runs(
    where: str, part: OutputModule, tower: Tower | None, config: MergeConfig, models: Models, problems: Problems
) -> list[Run]:
    method = config.method_of(part)
    base_ref = part.base_model or config.base_model
    if part.models is not None:
        entries: list[Entry] = [(m.model, None, m.parameters) for m in part.models]
        # What a base_model is there for besides: what `towers` copies, and modules with another method.
        elsewhere = config.towers is not None or any(other.base != "unused" for other in config.methods)
        if base_ref is not None and not _listed(base_ref, entries, models):
            if method.base != "unused":
                entries.append((base_ref, None, {}))
            elif part.base_model is not None or not elsewhere:
                problems.config(
                    f"{where}base_model: {method.name} has no base; list {base_ref!r} under `{where}models` to "
                    "merge it too, or remove it (tokenizer_source chooses a tokenizer)"
                )
        return [_run(f"{where}models", entries, base_ref, (part.parameters,), 0, method, tower, models, problems)]
    runs: list[Run] = []
    for i, output in enumerate(part.slices or ()):
        place = f"{where}slices.{i}.sources"
        entries = [(s.model, s.layer_range, s.parameters) for s in output.sources]
        lengths = [s.layer_range[1] - s.layer_range[0] for s in output.sources]
        if len(set(lengths)) > 1:
            problems.config(f"{place}: {' and '.join(map(str, lengths))} layers; all sources must have equally many")
        base = output.base_model if output.base_model is not None else base_ref
        levels = (output.parameters, part.parameters)
        runs.append(_run(place, entries, base, levels, lengths[0], method, tower, models, problems))
    return runs


def _listed(ref: str, entries: Sequence[Entry], models: Models) -> bool:
    return models.index[ref] in {models.index[entry[0]] for entry in entries}


def _run(
    where: str,
    entries: Sequence[Entry],
    base_ref: str | None,
    levels: tuple[Mapping[str, Any], ...],
    length: int,
    method: Method,
    tower: Tower | None,
    models: Models,
    problems: Problems,
) -> Run:
    sources: list[Source] = []
    seen: dict[int, str] = {}
    for i, (ref, layers, own) in enumerate(entries):
        model = models.index[ref]
        if model in seen:
            called = repr(ref) if ref == seen[model] else f"{seen[model]!r} and {ref!r}"
            problems.config(f"{where}: {called}: the same model twice; give it one entry with the sum of its weights")
        seen[model] = ref
        sources.append(Source(model, layers[0] if layers else 0, own, f"{where}.{i}"))
        if layers is not None and (problem := _range_problem(models, model, tower, layers)):
            problems.config(f"{where}.{i}.layer_range: {ref!r} {problem}")
    base = models.index[base_ref] if base_ref is not None and method.base != "unused" else None
    if method.base == "required" and base is None:
        problems.config(f"base_model: {method.name} needs one (the model that the others were made from)")
    elif base is not None and base not in seen:
        problems.config(f"{where}: {method.name} needs the base {base_ref!r} here too, with its layer_range")
    others = [source for source in sources if source.model != base]
    if not others:
        problems.config(f"{where}: only the base is listed; {method.name} needs at least one model besides it")
    elif not method.fewest_models <= len(others) <= (method.most_models or len(others)):
        found = f"{len(others)} found: {some([entry[0] for entry in entries if models.index[entry[0]] != base])}"
        problems.config(f"{where}: {method.name} needs {_wanted(method)}; {found}")
    for source in sources:
        if source.model == base and source.parameters:
            named = some(list(source.parameters))
            problems.config(f"{source.where}.parameters: {named} has no effect on the base of {method.name}; remove it")
    return Run(tuple(sources), base, length, method, levels)


def _wanted(method: Method) -> str:
    few, most = method.fewest_models, method.most_models
    number = f"exactly {few}" if few == most else f"at least {few}" if most is None else f"{few} to {most}"
    noun = "model" if most == 1 or (most is None and few == 1) else "models"
    return f"{number} {noun}" + (" besides the base" if method.base == "required" else "")


def _range_problem(models: Models, model: int, tower: Tower | None, layers: tuple[int, int]) -> str | None:
    towers = models.towers[model]
    if tower is None and len(towers) > 1:
        stacks = [stack for other in towers for stack in other.stacks]
        return f"has several stacks of layers ({some(stacks)}); slice one of its `modules`: {_listing(towers)}"
    mine = next(iter(towers), None) if tower is None else find_tower(towers, tower.name)
    if mine is None:
        return f"has no {tower.name if tower else ''}; {_listing(towers)}"
    if not mine.stacks:
        return "has no layers that could be sliced"
    if len(mine.stacks) > 1:
        return f"has several stacks of layers ({some(list(mine.stacks))}); slices need one"
    config = models.checkpoints[model].config
    stated, found = layer_count(config, mine), next(iter(mine.stacks.values()))
    if stated is None or stated == found:
        if layers[1] > found:
            return f"has {found} layers, and {list(layers)} reaches beyond them (the end of a range is excluded)"
        return None
    if stated + (text_config(config).get("num_nextn_predict_layers") or 0) == found:
        return (
            f"has {stated} layers and behind them {found - stated} for multi-token prediction; slices of such a model "
            "are not supported: leave those layers out (weights and num_nextn_predict_layers) first"
        )
    return f"has {stated} layers by its config.json, but weights of {found}; slices are not possible"

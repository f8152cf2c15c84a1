"""The runs of a recipe: consecutive layers of the output that are made of the same models in the same way.

`models:` is one run over everything; every entry of `slices:` is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from solera_core.architecture import layer_of, num_layers
from solera_core.checkpoint import Checkpoint
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import Method
from solera_merge.models import Models
from solera_merge.problems import Problems, some

__all__ = ["Run", "Source", "runs_of"]


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
        parameters: of this slice.
    """

    sources: tuple[Source, ...]
    base: int | None
    length: int
    parameters: Mapping[str, Any]


Entry: TypeAlias = tuple[str, tuple[int, int] | None, Mapping[str, Any]]  # reference, layer range, parameters


def runs_of(config: MergeConfig, models: Models, problems: Problems) -> list[Run]:
    """The runs of a recipe, the base added as a source where the method needs it.

    Problems are noted: a wrong number of models, the same model twice, no base where one is needed, parameters on the
    base, unequal or impossible layer ranges.
    """
    runs: list[Run] = []
    if config.models is not None:
        entries: list[Entry] = [(m.model, None, m.parameters) for m in config.models]
        if config.base_model is not None and not _listed(config.base_model, entries, models):
            if config.method.base != "unused":
                entries.append((config.base_model, None, {}))
            else:
                problems.config(
                    f"base_model: {config.merge_method} has no base; list {config.base_model!r} under `models` to "
                    "merge it too, or remove it (tokenizer_source chooses a tokenizer)"
                )
        length = num_layers(models.checkpoints[models.owner].config) or 0
        runs.append(_run("models", entries, config.base_model, {}, length, config.method, models, problems))
    for i, output in enumerate(config.slices or ()):
        where = f"slices.{i}.sources"
        entries = [(s.model, s.layer_range, s.parameters) for s in output.sources]
        lengths = [s.layer_range[1] - s.layer_range[0] for s in output.sources]
        if len(set(lengths)) > 1:
            problems.config(f"{where}: {' and '.join(map(str, lengths))} layers; all sources must have equally many")
        base = output.base_model if output.base_model is not None else config.base_model
        runs.append(_run(where, entries, base, output.parameters, lengths[0], config.method, models, problems))
    return runs


def _listed(ref: str, entries: Sequence[Entry], models: Models) -> bool:
    return models.index[ref] in {models.index[entry[0]] for entry in entries}


def _run(
    where: str,
    entries: Sequence[Entry],
    base_ref: str | None,
    parameters: Mapping[str, Any],
    length: int,
    method: Method,
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
        if layers is not None and (problem := _range_problem(models.checkpoints[model], layers)):
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
    return Run(tuple(sources), base, length, parameters)


def _wanted(method: Method) -> str:
    few, most = method.fewest_models, method.most_models
    number = f"exactly {few}" if few == most else f"at least {few}" if most is None else f"{few} to {most}"
    noun = "model" if most == 1 or (most is None and few == 1) else "models"
    return f"{number} {noun}" + (" besides the base" if method.base == "required" else "")


def _range_problem(checkpoint: Checkpoint, layers: tuple[int, int]) -> str | None:
    found = {place for name in checkpoint.tensors if (place := layer_of(name)) is not None}
    stacks = sorted({stack for stack, _ in found})
    if not stacks:
        return "has no layers that could be sliced"
    if len(stacks) > 1:
        return f"has several stacks of layers ({some(stacks)}); slices need one"
    stated = num_layers(checkpoint.config)
    if stated is not None and stated != len(found):
        return f"has {stated} layers by its config.json, but weights of {len(found)}; slices are not possible"
    if layers[1] > len(found):
        return f"has {len(found)} layers, and {list(layers)} reaches beyond them (the end of a range is excluded)"
    return None

"""Which output tensors there are, and which tensors of which models each is made of.

No table of architectures: a tensor belongs to a layer when its name says so, and everything else lies before or behind
the layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from solera_core.architecture import is_embedding, is_head, text_config
from solera_core.checkpoint import TensorInfo
from solera_core.towers import Tower, find_tower, layer_count, stacks_of
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.runs import Part, Run, Source

__all__ = ["Target", "find_targets", "lies_before"]

# Tables of sines, positions and causal masks that old checkpoints store and transformers computes: left out.
_DERIVED = (
    ".rotary_emb.inv_freq",
    ".rotary_pos_emb.inv_freq",
    ".attn.masked_bias",
    ".attention.masked_bias",
    "embeddings.position_ids",
)
_MASKS = (".attn.bias", ".attention.bias")  # of shape [1, 1, T, T]; a bias of the same name has one axis


@dataclass(frozen=True)
class Target:
    """One output tensor.

    Attributes:
        name: in the output.
        run: how it is made.
        inputs: name of the tensor in each source of the run, in that order.
        t: place of its layer within the run, 0 to 1; 0 outside the layers.
    """

    name: str
    run: Run
    inputs: tuple[str, ...]
    t: float


@dataclass
class _Expansion:
    models: Models
    problems: Problems
    missing: dict[tuple[Path, Path], list[str]] = field(default_factory=dict[tuple[Path, Path], list[str]])
    derived: list[str] = field(default_factory=list[str])
    wanted: Literal["intersection", "union"] | None = None
    left_out: list[str] = field(default_factory=list[str])
    fewer: list[str] = field(default_factory=list[str])

    def tensors(self, source: Source) -> Mapping[str, TensorInfo]:
        return self.models.checkpoints[source.model].tensors

    def everywhere(self, run: Run, names: Sequence[Sequence[str]]) -> Iterator[tuple[Run, tuple[str, ...]]]:
        """Tensors that correspond across the sources of a run, `names[i]` being the i-th source's names for them.

        Yields those that every source has, with the run; of the others those that the recipe wants merged from fewer
        sources, with a run of these. Notes which model has what is left and which has not.
        """
        for row in zip(*names, strict=True):
            have = [name in self.tensors(s) for s, name in zip(run.sources, row, strict=True)]
            haver = have.index(True)
            if not self.models.raw and _is_derived(row[haver], self.tensors(run.sources[haver])[row[haver]]):
                self.derived.append(row[haver])
                continue
            if all(have):
                yield run, row
                continue
            if self.wanted == "intersection":
                self.left_out.append(row[haver])
                continue
            if self.wanted == "union" and (less := _of_fewer(run, have)) is not None:
                self.fewer.append(row[haver])
                yield less, tuple(name for name, there in zip(row, have, strict=True) if there)
                continue
            for source, name, there in zip(run.sources, row, have, strict=True):
                if not there:
                    file = self.tensors(run.sources[haver])[row[haver]].file
                    absent = self.models.checkpoints[source.model].path
                    self.missing.setdefault((file, absent), []).append(name)

    def names(self, source: Source, tower: Tower | None) -> Sequence[str]:
        """The tensors of a source that belong to a tower of the owner."""
        mine = None if tower is None else find_tower(self.models.towers[source.model], tower.name)
        if mine is None:
            return () if tower is not None else list(self.tensors(source))
        return mine.tensors

    def note_missing(self) -> None:
        for (there, absent), names in self.missing.items():
            head = " (its head is tied to the embedding)" if any(is_head(name) for name in names) else ""
            self.problems.checkpoint(
                f"{absent}: has no tensor {some(names)}{head}, which {there} has; "
                "nothing is dropped or made up: merge models with the same tensors"
            )


def _of_fewer(run: Run, have: Sequence[bool]) -> Run | None:
    """A run of the sources that have a tensor; None where its base is not among them, or the method needs more."""
    sources = tuple(source for source, there in zip(run.sources, have, strict=True) if there)
    others = [source for source in sources if source.model != run.base]
    based = run.base is None or len(others) < len(sources)
    return replace(run, sources=sources) if based and len(others) >= max(run.method.fewest_models, 1) else None


def find_targets(
    parts: Sequence[Part],
    models: Models,
    problems: Problems,
    wanted: Literal["intersection", "union"] | None = None,
) -> tuple[list[Target], list[str]]:
    """Every output tensor in the order of the output, and warnings.

    Tensors that some models of a run have and others lack are noted as problems, all of them, and left out.

    Args:
        parts: of the recipe. Where one is sliced, layers are numbered anew; tensors before the layers come from its
            first run and those behind them from its last.
        models: as opened.
        problems: where they are noted.
        wanted: what is done instead, where the models are files of weights.
    """
    expansion = _Expansion(models, problems, wanted=wanted if models.raw else None)
    targets: list[Target] = []
    for part in parts:
        targets += _whole(part, expansion) if part.whole else _stacked(part, expansion)
    expansion.note_missing()
    warnings = []
    if expansion.derived:
        names = list(dict.fromkeys(expansion.derived))
        warnings.append(f"{some(names, 1)}: left out, because transformers computes it from the config")
    if expansion.left_out:
        warnings.append(f"{some(expansion.left_out)}: not in all files, and left out (`tensors: intersection`)")
    if expansion.fewer:
        warnings.append(f"{some(expansion.fewer)}: merged from the files that have it (`tensors: union`)")
    return targets, warnings


def _is_derived(name: str, info: TensorInfo) -> bool:
    return name.endswith(_DERIVED) or (name.endswith(_MASKS) and len(info.shape) == 4)


def _whole(part: Part, expansion: _Expansion) -> Iterator[Target]:
    run = part.runs[0]
    names = list(dict.fromkeys(name for source in run.sources for name in expansion.names(source, part.tower)))
    stacks = stacks_of(names)
    counted = stacks | _counted(expansion.models)
    for made, row in expansion.everywhere(run, [names] * len(run.sources)):
        place = _place(row[0], stacks)
        yield Target(row[0], made, row, 0.0 if place is None else _t(place[1], counted[place[0]]))


def _stacked(part: Part, expansion: _Expansion) -> Iterator[Target]:
    owner = expansion.models.towers[expansion.models.owner]
    stack = next(iter((part.tower or owner[0]).stacks))  # `parts_of` has found just one in every source
    yield from _outside(part, part.runs[0], stack, expansion, before=True)
    position = 0
    for run in part.runs:
        for layer in range(run.length):
            # What a layer holds, by the part of the name behind the number, over all sources.
            places = [f"{stack}.{source.first + layer}." for source in run.sources]
            inside = [
                [n.removeprefix(place) for n in expansion.names(s, part.tower) if n.startswith(place)]
                for s, place in zip(run.sources, places, strict=True)
            ]
            suffixes = list(dict.fromkeys(suffix for names in inside for suffix in names))
            if not suffixes:
                absent = expansion.models.checkpoints[run.sources[0].model].path
                expansion.problems.checkpoint(f"{absent}: has no tensors of layer {places[0].rstrip('.')}")
            names = [[place + suffix for suffix in suffixes] for place in places]
            for _, row in expansion.everywhere(run, names):
                suffix = row[0].removeprefix(places[0])
                yield Target(f"{stack}.{position + layer}.{suffix}", run, row, _t(layer, run.length))
        position += run.length
    yield from _outside(part, part.runs[-1], stack, expansion, before=False)


def _outside(part: Part, run: Run, stack: str, expansion: _Expansion, *, before: bool) -> Iterator[Target]:
    found = dict.fromkeys(name for s in run.sources for name in expansion.names(s, part.tower))
    chosen = [name for name in found if not name.startswith(f"{stack}.") and lies_before(name) == before]
    for _, row in expansion.everywhere(run, [chosen] * len(run.sources)):
        yield Target(row[0], run, row, 0.0)


def lies_before(name: str) -> bool:
    """Embeddings (of tokens, positions, types, and their norms) come before the layers, everything else behind them."""
    return is_embedding(name) or (not is_head(name) and any(word in name for word in ("embed", "wte", "wpe")))


def _place(name: str, stacks: Mapping[str, int]) -> tuple[str, int] | None:
    """(stack, number of the layer); None outside the layers."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if i and part.isdigit()), None)
    stack = ".".join(parts[:at])
    return (stack, int(parts[at])) if at is not None and stack in stacks else None


def _counted(models: Models) -> dict[str, int]:
    """Layers of a stack that holds more: behind them lie those for multi-token prediction, whose place is the last."""
    config = models.checkpoints[models.owner].config
    extra = text_config(config).get("num_nextn_predict_layers") or 0
    return {
        stack: found - extra
        for tower in models.towers[models.owner]
        for stack, found in tower.stacks.items()
        if extra and layer_count(config, tower) == found - extra
    }


def _t(layer: int, length: int) -> float:
    """Place of a layer on a gradient; the only layer of a run is its end, as in mergekit."""
    return min(layer / (length - 1), 1.0) if length > 1 else 1.0

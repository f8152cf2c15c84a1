"""Which output tensors there are, and which tensors of which models each is made of.

No table of architectures: a tensor belongs to a layer when its name says so, and everything else lies before or behind
the layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from solera_core.architecture import is_embedding, is_head, layer_of
from solera_core.checkpoint import TensorInfo
from solera_merge.models import Models
from solera_merge.problems import Problems, some
from solera_merge.runs import Run, Source

__all__ = ["Target", "find_targets", "lies_before"]

# Tables of sines that old checkpoints store and transformers computes: left out wherever they appear.
_DERIVED = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")


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

    def tensors(self, source: Source) -> Mapping[str, TensorInfo]:
        return self.models.checkpoints[source.model].tensors

    def everywhere(self, run: Run, names: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
        """Tensors that correspond across the sources of a run, `names[i]` being the i-th source's names for them.

        Yields those that every source has; notes for the others which model has them and which has not.
        """
        for row in zip(*names, strict=True):
            if row[0].endswith(_DERIVED):
                self.derived.append(row[0])
                continue
            have = [name in self.tensors(s) for s, name in zip(run.sources, row, strict=True)]
            if all(have):
                yield row
                continue
            haver = have.index(True)
            for source, name, there in zip(run.sources, row, have, strict=True):
                if not there:
                    file = self.tensors(run.sources[haver])[row[haver]].file
                    absent = self.models.checkpoints[source.model].path
                    self.missing.setdefault((file, absent), []).append(name)

    def note_missing(self) -> None:
        for (there, absent), names in self.missing.items():
            head = " (its head is tied to the embedding)" if any(is_head(name) for name in names) else ""
            self.problems.checkpoint(
                f"{absent}: has no tensor {some(names)}{head}, which {there} has; "
                "nothing is dropped or made up: merge models with the same tensors"
            )


def find_targets(runs: Sequence[Run], models: Models, *, whole: bool) -> tuple[list[Target], list[str]]:
    """Every output tensor in the order of the output, and warnings.

    Args:
        runs: of the recipe.
        models: as opened.
        whole: the one run spans all tensors of every model; else layers are numbered anew, tensors before the layers
            come from the first run and those behind them from the last.

    Raises:
        CheckpointError: tensors that some models of a run have and others lack; all are listed.
    """
    expansion = _Expansion(models, Problems())
    targets = list(_whole(runs[0], expansion) if whole else _stacked(runs, expansion))
    expansion.note_missing()
    expansion.problems.raise_any()
    warnings = []
    if expansion.derived:
        names = list(dict.fromkeys(expansion.derived))
        warnings.append(f"{some(names, 1)}: left out, because transformers computes it from the config")
    return targets, warnings


def _whole(run: Run, expansion: _Expansion) -> Iterator[Target]:
    names = list(dict.fromkeys(name for source in run.sources for name in expansion.tensors(source)))
    depth: dict[str, int] = {}
    for name in names:
        if (place := layer_of(name)) is not None:
            depth[place[0]] = max(depth.get(place[0], 0), place[1])
    for row in expansion.everywhere(run, [names] * len(run.sources)):
        place = layer_of(row[0])
        yield Target(row[0], run, row, 0.0 if place is None else _t(place[1], depth[place[0]] + 1))


def _stacked(runs: Sequence[Run], expansion: _Expansion) -> Iterator[Target]:
    yield from _outside(runs[0], expansion, before=True)
    position = 0
    for run in runs:
        for layer in range(run.length):
            # What a layer holds, by the part of the name behind the number, over all sources.
            inside = [_layer(expansion.tensors(s), s.first + layer) for s in run.sources]
            stack = _stack(expansion.tensors(run.sources[0]))
            suffixes = list(dict.fromkeys(suffix for part in inside for suffix in part))
            names = [[f"{stack}.{s.first + layer}.{suffix}" for suffix in suffixes] for s in run.sources]
            for row in expansion.everywhere(run, names):
                suffix = row[0].removeprefix(f"{stack}.{run.sources[0].first + layer}.")
                yield Target(f"{stack}.{position + layer}.{suffix}", run, row, _t(layer, run.length))
        position += run.length
    yield from _outside(runs[-1], expansion, before=False)


def _outside(run: Run, expansion: _Expansion, *, before: bool) -> Iterator[Target]:
    names = list(dict.fromkeys(n for s in run.sources for n in expansion.tensors(s) if layer_of(n) is None))
    chosen = [name for name in names if lies_before(name) == before]
    for row in expansion.everywhere(run, [chosen] * len(run.sources)):
        yield Target(row[0], run, row, 0.0)


def lies_before(name: str) -> bool:
    """Embeddings (of tokens, positions, types, and their norms) come before the layers, everything else behind them."""
    return is_embedding(name) or (not is_head(name) and any(word in name for word in ("embed", "wte", "wpe")))


def _stack(tensors: Mapping[str, TensorInfo]) -> str:
    return next(place[0] for name in tensors if (place := layer_of(name)) is not None)


def _layer(tensors: Mapping[str, TensorInfo], index: int) -> list[str]:
    prefix = f"{_stack(tensors)}.{index}."
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def _t(layer: int, length: int) -> float:
    """Place of a layer on a gradient; the only layer of a run is its end, as in mergekit."""
    return layer / (length - 1) if length > 1 else 1.0

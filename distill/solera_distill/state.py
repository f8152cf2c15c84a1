"""The state of an unfinished training run on disk: what a killed run needs to end with the bytes it would have had.

Only what cannot be computed again is stored: trained parameters, the optimizer's moments, the place in the data, the
log. There is no random state: all randomness is keyed by (seed, step). A state is a directory that appears by one
rename, after it is on the disk; so there is none, or a whole one.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from solera_core.staging import fsync_tree
from solera_distill.batches import Cursor

__all__ = ["Position", "State", "StateFolder"]

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on.
        cursor: the next piece.
        log: the rows of training.jsonl so far.
    """

    step: int = 0
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass
class State:
    """Position, trained parameters by name, the optimizer's state of each, and the parameters that were best so far."""

    position: Position
    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    best: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class StateFolder:
    """Where the states of one run lie; only the newest is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, state: State) -> None:
        """Write a state, then remove the older ones."""
        self._directory.mkdir(exist_ok=True)
        scratch = self._directory / f"writing-{state.position.step}"
        if scratch.exists():  # a kill had torn it
            shutil.rmtree(scratch)
        older = list(self._directory.iterdir())
        scratch.mkdir()
        tensors = {f"parameter/{n}": t.detach().contiguous() for n, t in state.parameters.items()}
        tensors |= {f"best/{n}": t.contiguous() for n, t in state.best.items()}
        for name, moments in state.moments.items():
            tensors |= {f"{key}/{name}": moments[key].contiguous() for key in _MOMENTS}
            tensors[f"step/{name}"] = moments["step"].clone()
        save_file(tensors, scratch / "tensors.safetensors")
        (scratch / "position.json").write_text(json.dumps(asdict(state.position)), encoding="utf-8")
        fsync_tree(scratch)
        final = self._directory / f"step-{state.position.step:09d}"
        scratch.rename(final)
        descriptor = os.open(self._directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        for path in older:
            shutil.rmtree(path)

    def load(self) -> State | None:
        """The newest state; None where there is none that can be read."""
        for directory in sorted(self._directory.glob("step-*"), reverse=True):
            try:
                position = json.loads((directory / "position.json").read_text(encoding="utf-8"))
                tensors = load_file(directory / "tensors.safetensors")
            except (OSError, ValueError, SafetensorError):
                continue
            parameters: dict[str, Tensor] = {}
            moments: dict[str, dict[str, Tensor]] = {}
            best: dict[str, Tensor] = {}
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                if kind == "parameter":
                    parameters[name] = tensor
                elif kind == "best":
                    best[name] = tensor
                else:
                    moments.setdefault(name, {})[kind] = tensor
            cursor = Cursor(**position.pop("cursor"))
            return State(Position(cursor=cursor, **position), parameters, moments, best)
        return None

    def remove(self) -> None:
        """Delete all states: the run is done."""
        shutil.rmtree(self._directory, ignore_errors=True)


def optimizer_moments(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, dict[str, Tensor]]:
    """The state of every parameter by name; `names` by id of the parameter."""
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items() if state}


def restore(state: State, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put a state into a model's trainable parameters and their optimizer."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
            if name in state.moments:
                optimizer.state[parameter] = {
                    key: tensor.to(parameter.device) if key != "step" else tensor
                    for key, tensor in state.moments[name].items()
                }

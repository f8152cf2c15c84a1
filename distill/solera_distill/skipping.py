"""Running a model as if some of its layers were not there."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from solera_core.errors import CheckpointError

__all__ = ["layer_stack", "without_layers"]


def layer_stack(model: Any, layers: int, where: str) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        CheckpointError: not exactly one list of `layers` modules.
    """
    found = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: {type(model).__name__} has no single list of {layers} layers; use layer_drop.keep"
        )
    return found[0]


@contextlib.contextmanager
def without_layers(stack: nn.ModuleList, gone: Collection[int]) -> Iterator[None]:
    """Within the context, the layers `gone` hand their input on unchanged.

    They still run and their result is thrown away: that costs time, but works for every family, whatever its layers are
    given and return beside the hidden states.
    """

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [stack[i].register_forward_hook(hand_on, with_kwargs=True) for i in sorted(gone)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

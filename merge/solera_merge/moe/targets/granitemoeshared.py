"""Target granitemoeshared: what granitemoe holds, with a shared expert beside the routed ones.

Its output is added as it is. Without `shared` in the recipe it is 32 wide and all zeros, so it adds nothing.
"""

from collections.abc import Mapping
from typing import Any, Final

from solera_merge.moe.targets.granitemoe import (
    GRANITE_HOMES,
    GRANITE_SLOTS,
    granite_engines,
    granite_settings,
    granite_zeros,
)
from solera_merge.moe.targets.target import SharedHome, Sizes, Slot, Target

__all__ = ["TARGET"]

_SHARED_WIDTH: Final = 32
"""Not 0: engines take that for "not given"."""


def _settings(fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    return granite_settings(fields, sizes) | {"shared_intermediate_size": sizes.shared or _SHARED_WIDTH}


def _zeros(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d = fields["hidden_size"]
    return granite_zeros(fields) | {
        "shared_mlp.input_linear.weight": (2 * _SHARED_WIDTH, d),
        "shared_mlp.output_linear.weight": (d, _SHARED_WIDTH),
    }


TARGET: Final = Target(
    name="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    homes=GRANITE_HOMES,
    router="model.layers.{layer}.block_sparse_moe.router.layer.weight",
    router_path="model.layers.{layer}.block_sparse_moe.router",
    slots=GRANITE_SLOTS,
    settings=_settings,
    engines=granite_engines,
    zeros=_zeros,
    shared=SharedHome(
        (
            Slot("shared_mlp.input_linear.weight", half=0),
            Slot("shared_mlp.input_linear.weight", half=1),
            Slot("shared_mlp.output_linear.weight"),
        ),
        factor=1.0,
    ),
)

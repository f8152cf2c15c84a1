"""`adapter:` in a merge recipe: the models are LoRA adapters, and so is the output."""

from typing import Literal

from pydantic import Field, model_validator

from solera_core.strict import Strict
from solera_merge.adapters.low_rank import Keep

__all__ = ["COMBINATIONS", "METHODS_OF_UPDATES", "AdapterSettings"]

COMBINATIONS = ("linear", "task_arithmetic")
"""Methods whose result is a weighted sum of the updates: merged from the factors, exactly."""

METHODS_OF_UPDATES = (
    *COMBINATIONS,
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "iso_c",
    "iso_cts",
    "magmax",
    "model_stock",
    "ram",
    "ramplus_tl",
    "sce",
    "ties",
    "tsv_m",
)
"""Methods that see nothing of the models but their change of the base, which is what an adapter holds."""


class AdapterSettings(Strict):
    """How the merged update is written as a low-rank one.

    Attributes:
        rank: of every update of the output; or
        energy: share of the squared norm of each merged update that is kept, above 0, at most 1. With neither, nothing
            is cut off: the ranks add up (for weighted sums, and in the space of KnOTS).
        max_rank: bound of the ranks that `energy` leads to.
        space: where the method works: on the `product` of the factors, or on the parts of V in the singular vectors
            that the updates share (`knots`, arXiv 2410.19735).
    """

    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    max_rank: int | None = Field(default=None, ge=1)
    space: Literal["product", "knots"] = "product"

    @model_validator(mode="after")
    def _one_measure(self) -> "AdapterSettings":
        if self.rank is not None and self.energy is not None:
            raise ValueError("give a rank or an energy, not both")
        if self.max_rank is not None and self.energy is None:
            raise ValueError("max_rank bounds the ranks found by energy")
        return self

    @property
    def keep(self) -> Keep | None:
        """How many directions an update of the output has; None: as many as it takes."""
        return None if self.rank is None and self.energy is None else Keep(self.rank, self.energy, self.max_rank)

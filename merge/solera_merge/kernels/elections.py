"""How a sign is elected, as kernels are told."""

from typing import Final

__all__ = ["ELECT_NONE", "ELECT_UNWEIGHTED", "ELECT_WEIGHTED"]

ELECT_NONE: Final = 0
ELECT_WEIGHTED: Final = 1
ELECT_UNWEIGHTED: Final = 2
"""Which sum elects a sign: none, that of the weighted deltas, that of the deltas themselves."""

"""Every error solera raises on purpose.

    SoleraError                 exit code 3
    ├── InputError              3   what the user gave is wrong
    │   ├── ConfigError             a recipe, a key, a value
    │   ├── CheckpointError         a model: names file, tensor and shapes
    │   ├── DataError               text or items: names file and line
    │   └── TargetError             the output directory
    ├── VerificationError       3   something written does not equal what was promised
    └── ResourceError           4   the machine or the network
        ├── DiskFullError
        └── HubError

A message says which file, which key or tensor, both shapes where two disagree, and what to do next.
Exit codes 1 (a gate failed) and 2 (inconclusive) are verdicts, not errors; 130 is an interrupt. An OSError that nobody
foresaw ends in 4 as well; any other exception that is not in this tree is a bug of solera and ends in 70.
"""

from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "HubError",
    "InputError",
    "ResourceError",
    "SoleraError",
    "TargetError",
    "VerificationError",
]


class SoleraError(Exception):
    """Base of the tree; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 3


class InputError(SoleraError):
    """What the user gave is wrong."""


class ConfigError(InputError):
    """A recipe, a key or a value is wrong."""


class CheckpointError(InputError):
    """A model is not what it should be."""


class DataError(InputError):
    """Text or evaluation items are not what they should be."""


class TargetError(InputError):
    """The output directory cannot be used."""


class VerificationError(SoleraError):
    """Something written does not equal what was promised."""


class ResourceError(SoleraError):
    """The machine or the network cannot do it now."""

    exit_code: ClassVar[int] = 4


class DiskFullError(ResourceError):
    """Not enough space on the disk, found beforehand or while writing."""


class HubError(ResourceError):
    """The hub cannot be reached, or refuses."""

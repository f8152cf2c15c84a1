"""What a checkpoint is: reading, writing, architecture, provenance, errors. The ground floor; imports no other package.

Import what you need from its modules (`solera_core.checkpoint`, `solera_core.writer`, ...); only what every caller
needs stands here, and none of it imports torch, transformers or numpy.
"""

from solera_core.context import Context
from solera_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    HubError,
    InputError,
    ResourceError,
    SoleraError,
    TargetError,
    VerificationError,
)
from solera_core.plan import Plan

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "DiskFullError",
    "HubError",
    "InputError",
    "Plan",
    "ResourceError",
    "SoleraError",
    "TargetError",
    "VerificationError",
]

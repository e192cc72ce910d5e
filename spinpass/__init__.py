"""spinpass: rotations for low-bit language models, as a compiler pass over ``torch.export`` programs."""

from spinpass.certificate import Certificate, verify
from spinpass.config import Override, RotationConfig
from spinpass.errors import (
    ConfigError,
    ExportError,
    InvariantError,
    ProgramError,
    QuantizedWeightError,
    RefusedError,
    SpinpassError,
    VerificationError,
)
from spinpass.pipeline import plan, transform
from spinpass.planning import RotationPlan
from spinpass.rotations import Rotation

__all__ = [
    "Certificate",
    "ConfigError",
    "ExportError",
    "InvariantError",
    "Override",
    "ProgramError",
    "QuantizedWeightError",
    "RefusedError",
    "Rotation",
    "RotationConfig",
    "RotationPlan",
    "SpinpassError",
    "VerificationError",
    "plan",
    "transform",
    "verify",
]

"""spinpass: rotations for low-bit language models, as a compiler pass over ``torch.export`` programs."""

from .config import Override, RotationConfig
from .errors import (
    ConfigError,
    ExportError,
    InvariantError,
    ProgramError,
    QuantizedWeightError,
    RefusedError,
    SpinpassError,
    VerificationError,
)
from .planning import RotationPlan
from .rotation import Rotation
from .transform import plan, transform
from .verify import Certificate, verify

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

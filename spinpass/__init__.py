"""spinpass: rotations for low-bit language models, as a compiler pass over ``torch.export`` programs."""

from spinpass.certificate import Certificate, verify
from spinpass.config import Override, RotationConfig
from spinpass.errors import (
    ConfigError,
    ExportError,
    InvariantError,
    LearningError,
    ProgramError,
    QuantizedWeightError,
    RefusedError,
    SpinpassError,
    VerificationError,
)
from spinpass.graph import materialize, on_device
from spinpass.learned import Learned, learn
from spinpass.learning import Learning
from spinpass.passes import lower
from spinpass.pipeline import Rotated, plan, rotate, transform
from spinpass.planning import RotationPlan
from spinpass.rotations import Rotation
from spinpass.version import __version__ as __version__

__all__ = [
    "Certificate",
    "ConfigError",
    "ExportError",
    "InvariantError",
    "Learned",
    "Learning",
    "LearningError",
    "Override",
    "ProgramError",
    "QuantizedWeightError",
    "RefusedError",
    "Rotated",
    "Rotation",
    "RotationConfig",
    "RotationPlan",
    "SpinpassError",
    "VerificationError",
    "learn",
    "lower",
    "materialize",
    "on_device",
    "plan",
    "rotate",
    "transform",
    "verify",
]

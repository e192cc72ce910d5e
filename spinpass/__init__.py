"""spinpass: rotations for low-bit language models, as a compiler pass over ``torch.export`` programs.

What rotates is imported with the package. What learns, rounds or reads files is imported when it is first asked for, so
that ``import spinpass`` stays as cheap as a rotation needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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
from spinpass.passes import lower
from spinpass.pipeline import Rotated, plan, rotate, transform
from spinpass.planning import RotationPlan
from spinpass.rotations import Rotation
from spinpass.version import __version__ as __version__

if TYPE_CHECKING:
    from spinpass.formats import load_plan, save_plan
    from spinpass.learned import Learned, learn
    from spinpass.learning import Learning

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
    "load_plan",
    "lower",
    "materialize",
    "on_device",
    "plan",
    "rotate",
    "save_plan",
    "transform",
    "verify",
]

_LATE = {
    "Learned": "spinpass.learned",
    "Learning": "spinpass.learning",
    "learn": "spinpass.learned",
    "load_plan": "spinpass.formats",
    "save_plan": "spinpass.formats",
}

if not TYPE_CHECKING:  # for the type checker every name is imported above, so that it still knows which there are

    def __getattr__(name: str) -> object:
        """Import what is asked for the first time."""
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_LATE[name]), name)
        return found

    def __dir__() -> list[str]:
        """List what is late as well."""
        return sorted({*globals(), *_LATE})

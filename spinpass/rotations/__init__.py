"""A rotation as a value, and the Hadamard matrices behind it. The package knows no graph."""

from . import hadamard
from .blocks import multiply_blocks
from .hadamard import is_order, largest_order
from .rotation import GIVEN_KINDS, SCALED, Rotation, rotation_by

__all__ = [
    "GIVEN_KINDS",
    "SCALED",
    "Rotation",
    "hadamard",
    "is_order",
    "largest_order",
    "multiply_blocks",
    "rotation_by",
]

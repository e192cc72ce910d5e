"""Edits, one per file: of one site (a decided space), or of a whole program."""

from .center import center
from .fold import fold_rotation
from .functionalize import open_program
from .fuse_norm_scale import fuse_norm_scale
from .insert_rotations import insert_rotations
from .last_token import last_token
from .lower_hadamards import lower_hadamards
from .materialize import materialize
from .own_constants import give_own_constants
from .untie import untie

__all__ = [
    "center",
    "fold_rotation",
    "fuse_norm_scale",
    "give_own_constants",
    "insert_rotations",
    "last_token",
    "lower_hadamards",
    "materialize",
    "open_program",
    "untie",
]

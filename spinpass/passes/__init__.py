"""Edits, one per file: some edit one site (a decided space), the others a whole program."""

from .center import CENTER
from .fold import FOLD_ROTATIONS
from .functionalize import open_program
from .fuse_norm_scale import FUSE_NORM_SCALE
from .insert_rotations import INSERT_ROTATIONS, stored_factors
from .last_token import last_token
from .lower_hadamards import lower_hadamards
from .lower_operators import lower
from .materialize import MATERIALIZE
from .online_transforms import (
    LOCATIONS,
    OnlineTransform,
    TransformLocation,
    is_rotated_online,
    online_transforms,
    transform_places,
    with_online_transforms,
)
from .own_constants import give_own_constants
from .repeat_heads import repeat_heads
from .return_states import return_states
from .runner import PassRunner
from .site_pass import SitePass
from .untie import untie

__all__ = [
    "CENTER",
    "FOLD_ROTATIONS",
    "FUSE_NORM_SCALE",
    "INSERT_ROTATIONS",
    "LOCATIONS",
    "MATERIALIZE",
    "OnlineTransform",
    "PassRunner",
    "SitePass",
    "TransformLocation",
    "give_own_constants",
    "is_rotated_online",
    "last_token",
    "lower",
    "lower_hadamards",
    "online_transforms",
    "open_program",
    "repeat_heads",
    "return_states",
    "stored_factors",
    "transform_places",
    "untie",
    "with_online_transforms",
]

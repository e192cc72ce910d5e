"""What a quantized program learns, a module for each thing that does: weights, vectors of floats, ranges."""

from .balance import balanced_bases, balancing_begins
from .bases import Basis, begun_basis, learned_bases, needs_of_bases, roles_of_bases
from .learn import learned
from .levels import channel_scales, takes_scales

__all__ = [
    "Basis",
    "balanced_bases",
    "balancing_begins",
    "begun_basis",
    "channel_scales",
    "learned",
    "learned_bases",
    "needs_of_bases",
    "roles_of_bases",
    "takes_scales",
]

"""What a quantized program learns, a module for each thing that does: weights, vectors of floats, ranges."""

from .balance import balanced_bases, balancing_begins
from .bases import Basis, begun_basis, learned_bases, needs_of_bases, roles_of_bases
from .learn import learned

__all__ = [
    "Basis",
    "balanced_bases",
    "balancing_begins",
    "begun_basis",
    "learned",
    "learned_bases",
    "needs_of_bases",
    "roles_of_bases",
]

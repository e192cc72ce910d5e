"""What a quantized program learns, a module for each thing that does: weights, vectors of floats, ranges."""

from .bases import Basis, learned_bases
from .learn import learned

__all__ = ["Basis", "learned", "learned_bases"]

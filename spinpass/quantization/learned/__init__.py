"""What a quantized program learns, a module for each thing that does: weights, vectors of floats, ranges."""

from .learn import learned

__all__ = ["learned"]

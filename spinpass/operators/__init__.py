"""``torch.ops.spinpass.*``: operators that rotated and quantized programs call, registered by importing the package."""

from .formulas import FORMULAS
from .hadamard import HADAMARD
from .packed_linear import dequantized, nearest, packed_linear, round_weight
from .rounding import round_rows, round_tensor, round_tokens, round_tokens_within
from .words import pack_words, unpack_words, words

__all__ = [
    "FORMULAS",
    "HADAMARD",
    "dequantized",
    "nearest",
    "pack_words",
    "packed_linear",
    "round_rows",
    "round_tensor",
    "round_tokens",
    "round_tokens_within",
    "round_weight",
    "unpack_words",
    "words",
]

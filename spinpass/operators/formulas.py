"""What the operators compute, as functions of torch's own operators, for those who write them out in a graph.

They are what the operators themselves run, so both give the same bits. The Hadamard is not among them: it works in
chunks, and :mod:`spinpass.passes.lower_hadamards` writes it as linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .packed_linear import linear_formula, weight_formula
from .rounding import rows_formula, tensor_formula, tokens_formula

FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "spinpass::packed_linear": linear_formula,
    "spinpass::round_rows": rows_formula,
    "spinpass::round_tensor": tensor_formula,
    "spinpass::round_tokens": tokens_formula,
    "spinpass::round_tokens_within": tokens_formula,
    "spinpass::round_weight": weight_formula,
}
"""By operator, a function that takes its arguments and returns its result; only the strides may differ."""

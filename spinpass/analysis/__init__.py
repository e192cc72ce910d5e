"""What operators do to bases (``ops``), where rotations could go (``patterns``), which axes share one (``basis``).

The analysis reads the graph and edits nothing.
"""

from .basis.group import Admitted, Group, admitted_by
from .basis.heads import Heads, by_heads, head_count
from .basis.linear_input import LinearInputWalk
from .basis.space import AxisType, CacheEdge, ConstantUse, Entry, Refusal, ShiftUse, Space
from .basis.spot_check import Checked, Fault, SpotCheck
from .basis.walk import Walk
from .ops.rules import Centring, Concatenate, Movement, Multilinear, Normalization, Opaque, Square, Zeros
from .ops.table import rule_of, tokens_per_call
from .patterns.attention import SOFTMAX, Attention, cache_values, find_attention
from .patterns.gates import Gate, find_gate
from .patterns.linear import Linear, as_linear, find_linears, normed_value, root_of, whole_axis
from .patterns.mlp import ACTIVATIONS, find_down_projections
from .patterns.residual import find_residual_sums
from .polynomial import Monomial, Polynomial, cancel
from .statistics import FlatNumber, Place, Statistics, Symbol, VectorForm

__all__ = [
    "ACTIVATIONS",
    "SOFTMAX",
    "Admitted",
    "Attention",
    "AxisType",
    "CacheEdge",
    "Centring",
    "Checked",
    "Concatenate",
    "ConstantUse",
    "Entry",
    "Fault",
    "FlatNumber",
    "Gate",
    "Group",
    "Heads",
    "Linear",
    "LinearInputWalk",
    "Monomial",
    "Movement",
    "Multilinear",
    "Normalization",
    "Opaque",
    "Place",
    "Polynomial",
    "Refusal",
    "ShiftUse",
    "Space",
    "SpotCheck",
    "Square",
    "Statistics",
    "Symbol",
    "VectorForm",
    "Walk",
    "Zeros",
    "admitted_by",
    "as_linear",
    "by_heads",
    "cache_values",
    "cancel",
    "find_attention",
    "find_down_projections",
    "find_gate",
    "find_linears",
    "find_residual_sums",
    "head_count",
    "normed_value",
    "root_of",
    "rule_of",
    "tokens_per_call",
    "whole_axis",
]

"""An exported program that can be edited, and how to read its nodes; the only place that touches private torch API."""

from .editor import (
    ProgramEditor,
    arguments,
    check_program,
    elements,
    functional_target,
    is_float,
    is_op,
    known_integers,
    mutates,
    op_name,
    shape,
    shares_memory,
    value,
)
from .layout import Layout, LayoutError, Size
from .signature import integers_as_buffers, integers_as_parameters, with_constants, without_constants

__all__ = [
    "Layout",
    "LayoutError",
    "ProgramEditor",
    "Size",
    "arguments",
    "check_program",
    "elements",
    "functional_target",
    "integers_as_buffers",
    "integers_as_parameters",
    "is_float",
    "is_op",
    "known_integers",
    "mutates",
    "op_name",
    "shape",
    "shares_memory",
    "value",
    "with_constants",
    "without_constants",
]

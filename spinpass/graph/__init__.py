"""An exported program that can be edited, and how to read its nodes; the only place that touches private torch API."""

from .checks import assume, check_program, is_size_class
from .concrete import ConcreteSizes, called, drawn
from .decomposition import decomposed, splice
from .devices import HOST, Device, device_of, named_device, on_device, placed
from .editor import ProgramEditor, copied_graph, shares_memory
from .folding import QueuedStep, folded
from .handles import Handle, linear_together, materialize, spooled, storage_key, values_of
from .invariants import Changes, Invariants
from .layout import Layout, LayoutError, Size
from .listing import listing
from .memory import trim
from .nodes import (
    arguments,
    differing,
    elements,
    frozen,
    functional_target,
    is_check,
    is_context,
    is_float,
    is_op,
    is_random,
    is_region,
    known_integers,
    lifted,
    mutates,
    op_name,
    reachable,
    remembered,
    same_strides,
    shape,
    value,
)
from .signature import integers_as_buffers, integers_as_parameters, with_constants, with_other_values, without_constants
from .sources import ConstantSource, Held, Rows, moved, row_blocks

__all__ = [
    "HOST",
    "Changes",
    "ConcreteSizes",
    "ConstantSource",
    "Device",
    "Handle",
    "Held",
    "Invariants",
    "Layout",
    "LayoutError",
    "ProgramEditor",
    "QueuedStep",
    "Rows",
    "Size",
    "arguments",
    "assume",
    "called",
    "check_program",
    "copied_graph",
    "decomposed",
    "device_of",
    "differing",
    "drawn",
    "elements",
    "folded",
    "frozen",
    "functional_target",
    "integers_as_buffers",
    "integers_as_parameters",
    "is_check",
    "is_context",
    "is_float",
    "is_op",
    "is_random",
    "is_region",
    "is_size_class",
    "known_integers",
    "lifted",
    "linear_together",
    "listing",
    "materialize",
    "moved",
    "mutates",
    "named_device",
    "on_device",
    "op_name",
    "placed",
    "reachable",
    "remembered",
    "row_blocks",
    "same_strides",
    "shape",
    "shares_memory",
    "splice",
    "spooled",
    "storage_key",
    "trim",
    "value",
    "values_of",
    "with_constants",
    "with_other_values",
    "without_constants",
]

"""From spaces to decisions: which are rotated, in which form and at what cost, and why others are not."""

from .plan import RotationPlan
from .planned import OfferedSpace, OnlinePart, PlannedSpace, Site, UntieRequest
from .planner import Planner
from .summary import grouped_refusals, grouped_spaces, layer_pattern, online_parts

__all__ = [
    "OfferedSpace",
    "OnlinePart",
    "PlannedSpace",
    "Planner",
    "RotationPlan",
    "Site",
    "UntieRequest",
    "grouped_refusals",
    "grouped_spaces",
    "layer_pattern",
    "online_parts",
]

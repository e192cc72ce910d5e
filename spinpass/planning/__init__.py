"""From spaces to decisions: which are rotated, in which form and at what cost, and why others are not."""

from .planner import PlannedSpace, Planner, RotationPlan, Site
from .summary import grouped_refusals, grouped_spaces, layer_pattern, online_parts

__all__ = [
    "PlannedSpace",
    "Planner",
    "RotationPlan",
    "Site",
    "grouped_refusals",
    "grouped_spaces",
    "layer_pattern",
    "online_parts",
]

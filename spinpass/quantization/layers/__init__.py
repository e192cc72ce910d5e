"""The places in a program's graph that are quantized, and how the linear layers there are spelled."""

from .chosen import ChosenSites
from .products import ORIGIN, operands, replace_product, sites_by_name, why_kept
from .sites import WeightSite, cache_sites, leading_to, weight_sites
from .unrounded import unrounded_operands

__all__ = [
    "ORIGIN",
    "ChosenSites",
    "WeightSite",
    "cache_sites",
    "leading_to",
    "operands",
    "replace_product",
    "sites_by_name",
    "unrounded_operands",
    "weight_sites",
    "why_kept",
]

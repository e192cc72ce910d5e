"""On what a fused decoder is compared: GroupQueryAttention takes another path for each of three kinds of call.

A prompt on an empty cache, a single token, and several tokens on a cache, which the kernel takes for one sequence only.
All three are cut out of one set of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import execution
from spinpass.execution import Sizes, UserInput

_CACHE_RANK = 4


def fused_cases(ep: ExportedProgram, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``values`` cut to a prompt without cache, one token per sequence, and one sequence; ``values`` alone where the
    program has no cache whose length is a size of its own."""
    specs = execution.user_inputs(ep)
    sizes = execution.bound_sizes(specs, values)
    caches = [s for s in specs if len(s.shape) == _CACHE_RANK and _is_symbol(s.shape[2])]
    ids = next((s for s in specs if len(s.shape) == 2 and _is_symbol(s.shape[1])), None)
    if not caches or ids is None:
        return [dict(values)]
    empty = {spec.shape[2]: 0 for spec in caches}
    one_token = {ids.shape[1]: 1}
    one_row = {ids.shape[0]: 1} if _is_symbol(ids.shape[0]) else {}
    return [_cut(specs, values, sizes | change) for change in (empty, one_token, one_row)]


def _cut(specs: list[UserInput], values: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The first entries along every axis; numbers stay."""
    cut = dict(values)
    for spec in specs:
        value = values[spec.name]
        if isinstance(value, Tensor):
            for axis, size in enumerate(spec.shape):
                value = value.narrow(axis, 0, execution.concrete(size, sizes))
            cut[spec.name] = value
    return cut


def _is_symbol(size: Any) -> bool:
    return bool(getattr(size, "is_symbol", False))

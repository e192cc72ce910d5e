"""Models that were traced before: a trace depends on the configuration, the weights are put in their places.

It takes a third of what a test of a folder takes, which makes the same model again and again. Tests of loading trace.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.graph import storage_key, with_other_values

_HELD = 24  # programs of tiny models


class Remembered:
    """``export_decoder``, which remembers its last programs."""

    def __init__(self, traced: Callable[..., ExportedProgram]) -> None:
        self.traced = traced
        self.count = 0
        self._programs: OrderedDict[Hashable, ExportedProgram] = OrderedDict()

    def __call__(self, model: Any, **options: Any) -> ExportedProgram:
        held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        if any(type(tensor.data) is not Tensor or tensor.device.type == "meta" for tensor in held.values()):
            return self.traced(model, **options)
        told = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        parts = tuple((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in held.items())
        first: dict[Hashable, str] = {}
        tied = tuple(first.setdefault(storage_key(tensor), name) for name, tensor in held.items())
        how = (getattr(model.config, "_attn_implementation", ""), options.get("one_by_one", False))
        key = (type(model), json.dumps(told, sort_keys=True, default=str), parts, tied, how)
        if key not in self._programs:
            self.count += 1
            self._programs[key] = self.traced(model, **options)
            if len(self._programs) > _HELD:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        found = self._programs[key]
        return with_other_values(found, {name: held[name].detach() for name in found.state_dict if name in held})

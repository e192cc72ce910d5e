"""Rotary embeddings whose frequencies depend on the length of the text, computed in the graph.

    LongRoPE:      f = where(longest > limit, long table, short table),         longest = max(positions) + 1
    dynamic NTK:   f = where(longest > limit, base stretched by longest, base)

transformers keeps the frequencies in a buffer that it writes to, or decides in Python, which a trace makes a constant.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_CHOSEN = {"longrope", "dynamic"}  # kinds whose frequencies depend on the length


@contextmanager
def rotary_in_graph(model: Any) -> Iterator[None]:
    """Let the rotary embeddings of ``model`` compute their frequencies from the largest position, without a state.

    LongRoPE (arXiv 2402.13753) has two tables and takes the long one beyond the length that the model was first trained
    on; dynamic NTK scaling stretches the base from there on. Both change by what is the largest position of a call, as
    in transformers, which keeps the choice in a buffer.
    """
    changed = [module for module in model.modules() if _CHOSEN & set(_kinds(module))]
    try:
        for module in changed:
            module.forward = functools.partial(_forward, module, inspect.unwrap(type(module).forward))
        yield
    finally:
        for module in changed:
            del module.forward


def _kinds(module: Any) -> list[str]:
    """Return the kinds of rotary embeddings that a module computes, one for each type of layer or one for all."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(type(module).forward, "__wrapped__"):
        return []
    return [kinds] if isinstance(kinds, str) else list(kinds.values()) if isinstance(kinds, dict) else []


def _forward(
    module: Any, plain: Callable[..., Any], x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Run the forward pass that does not update frequencies with those that the positions ask for."""
    of_layer = {} if layer_type is None else {"layer_type": layer_type}
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if kind in _CHOSEN:
        prefix = "" if layer_type is None else f"{layer_type}_"
        base: Tensor = getattr(module, f"{prefix}original_inv_freq")
        module = _With(module, f"{prefix}inv_freq", _frequencies(module, kind, base, position_ids.max() + 1, of_layer))
    return plain(module, x, position_ids, **of_layer)


def _frequencies(module: Any, kind: str, base: Tensor, length: Tensor, of_layer: dict[str, str]) -> Tensor:
    """Return the frequencies for a text of ``length`` tokens, which is computed; ``base`` are those of a short one."""
    make = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    stated = module.config.rope_parameters
    if kind == "longrope":
        limit = (stated[of_layer["layer_type"]] if of_layer else stated)["original_max_position_embeddings"]
        long, _ = make(module.config, base.device, seq_len=limit + 1, **of_layer)
        return torch.where(length > limit, long, base)
    stretched, _ = make(module.config, base.device, seq_len=length, **of_layer)
    return torch.where(length > module.original_max_seq_len, stretched, base)


class _With:
    """It stands for a module with one attribute exchanged."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self._module, self._name, self._value = module, name, value

    def __getattr__(self, name: str) -> Any:
        return self._value if name == self._name else getattr(self._module, name)

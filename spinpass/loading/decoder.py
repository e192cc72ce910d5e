"""A language model of transformers as one graph that reads prompts of any length and continues from any cache.

    logits, cache' = f(input_ids (batch, n), attention_mask (batch, past + n), position_ids (batch, n), cache)

Three things are made so that the graph is right for every batch and every length:

- **One row of the example is padded.** transformers drops a mask of ones from the graph that it traces, and rows of
  different length could then not share a batch.
- **Every cache is kept whole.** A layer with a window would otherwise carry a counter of its own that a trace makes a
  constant; its mask closes the window all the same.
- **Frequencies that depend on the length are chosen in the graph** (:func:`rotary_in_graph`), as values. The models
  write them into a buffer, or decide in Python.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.graph import assume

_SAMPLE = (2, 16)  # a batch of one would be specialised to one
_CHOSEN = {"longrope", "dynamic"}  # kinds of rotary embeddings whose frequencies depend on the length


def export_decoder(model: Any) -> ExportedProgram:
    """Export ``model`` (in eval mode, not changed) with its cache as inputs and outputs.

    Raises whatever tracing the model's own code raises.
    """
    ids = sample_ids(model)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    stages = importlib.import_module("transformers.exporters.utils")
    captured = stages.decompose_for_generation(
        model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True
    )
    traced, inputs = captured["decode"]
    traced.forward = _with_known_mask(traced.forward)
    return traced_program(traced, {name: _whole(value) for name, value in inputs.items()})


def traced_program(model: Any, inputs: dict[str, Any]) -> ExportedProgram:
    """Trace one call, every axis of its inputs dynamic that the model does not fix.

    Raises whatever tracing the model's own code raises.
    """
    exporters = importlib.import_module("transformers.exporters")
    with rotary_in_graph(model):
        exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    program: ExportedProgram = exported.program
    return program


def sample_ids(model: Any) -> Tensor:
    """Return token ids to trace with, int64 (2, 16)."""
    tokens: int = model.get_input_embeddings().num_embeddings
    return torch.arange(_SAMPLE[0] * _SAMPLE[1]).reshape(_SAMPLE) % tokens


def _whole(value: Any) -> Any:
    """Return a cache whose windowed layers keep all tokens, of the same length as the others; other values as they are.

    What the layers hold is not looked at by a trace.
    """
    caches = importlib.import_module("transformers.cache_utils")
    if not isinstance(value, caches.Cache) or not hasattr(value, "layers"):
        return value
    whole = copy.copy(value)
    whole.layers = [_whole_layer(caches, layer) for layer in value.layers]
    return whole


def _whole_layer(caches: Any, layer: Any) -> Any:
    if type(layer) is not caches.DynamicSlidingWindowLayer or not layer.is_initialized:
        return layer
    missing = layer.get_seq_length() - layer.keys.shape[-2]
    whole = caches.DynamicLayer()
    whole.update(*(torch.nn.functional.pad(kept, (0, 0, missing, 0)) for kept in (layer.keys, layer.values)))
    return whole


def _with_known_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` with what is known of the mask: it has the rows of the ids, and a place for every key.

    Of itself a trace gives it sizes of its own.
    """

    @functools.wraps(forward)
    def checked(*args: Any, **inputs: Any) -> Any:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2:
            caches = [v for v in inputs.values() if hasattr(v, "get_seq_length")]
            past = caches[0].get_seq_length() if caches else 0
            assume(mask.shape[0] == ids.shape[0])
            assume(mask.shape[1] == past + ids.shape[1])
        return forward(*args, **inputs)

    return checked


# -- rotary embeddings whose frequencies depend on the length ----------------------------------------------------------


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
            module.forward = functools.partial(_forward, module, type(module).forward.__wrapped__)
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
    kinds = module.rope_type
    kind = kinds if layer_type is None else kinds[layer_type]
    further = {} if layer_type is None else {"layer_type": layer_type}
    if kind in _CHOSEN:
        prefix = "" if layer_type is None else f"{layer_type}_"
        name, frequencies = f"{prefix}inv_freq", _frequencies(module, kind, position_ids, layer_type)
        return plain(_With(module, name, frequencies), x, position_ids, **further)
    return plain(module, x, position_ids, **further)


def _frequencies(module: Any, kind: str, position_ids: Tensor, layer_type: str | None) -> Tensor:
    make = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    prefix = "" if layer_type is None else f"{layer_type}_"
    short: Tensor = getattr(module, f"{prefix}original_inv_freq")
    length = position_ids.max() + 1
    if kind == "longrope":
        stated = module.config.rope_parameters
        limit = (stated if layer_type is None else stated[layer_type])["original_max_position_embeddings"]
        further = {} if layer_type is None else {"layer_type": layer_type}
        long, _ = make(module.config, short.device, seq_len=limit + 1, **further)
        return torch.where(length > limit, long, short)
    stretched: Tensor = make(module.config, short.device, seq_len=length, layer_type=layer_type)[0]
    return torch.where(length > module.original_max_seq_len, stretched, short)


class _With:
    """It stands for a module with one attribute exchanged."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self._module, self._name, self._value = module, name, value

    def __getattr__(self, name: str) -> Any:
        return self._value if name == self._name else getattr(self._module, name)

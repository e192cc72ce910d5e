"""A language model of transformers as one graph that reads prompts of any length and continues from any cache.

    logits, cache' = f(input_ids (batch, n), attention_mask (batch, past + n), position_ids (batch, n), cache)

Three things are made so that the graph is right for every batch and every length:

- **One row of the example is padded.** transformers drops a mask of ones from the graph that it traces, and rows of
  different length could then not share a batch.
- **Every cache is kept whole.** A layer with a window would otherwise carry a counter of its own that a trace makes a
  constant; its mask closes the window all the same.
- **What depends on the length is computed in the graph**: the frequencies of some rotary embeddings (:mod:`.rotary`),
  and which keys lie in a window where a row has padding (:mod:`.windows`).
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.graph import assume
from spinpass.passes import return_states

from .rotary import rotary_in_graph
from .windows import windows_by_position

_WHOLE = {
    "DynamicSlidingWindowLayer": "DynamicLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}
"""Transformers' layers of a cache with a window, and those that keep all tokens."""

_SAMPLE = (2, 16)  # a batch of one would be specialised to one


def export_decoder(
    model: Any, *, one_by_one: bool = False, running: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> ExportedProgram:
    """Export ``model`` (in eval mode, not changed) with its cache as inputs and outputs.

    ``one_by_one``: for models that go through the tokens of a call in a loop of Python, which a trace makes as long as
    its example. The program takes one token of each sequence at a call. ``running`` lets the model compute, where its
    weights are not in memory; what it computes are the inputs of the example.

    Raises whatever tracing the model's own code raises.
    """
    ids = sample_ids(model)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    stages = importlib.import_module("transformers.exporters.utils")
    asked = {"input_ids": ids, "attention_mask": mask, "use_cache": True}  # whatever the model was trained with
    with running():
        captured = stages.decompose_for_generation(model, asked, multi_token_decode=not one_by_one)
    traced, inputs = captured["decode"]
    traced.forward = _with_known_mask(traced.forward, inputs)
    return return_states(traced_program(traced, {name: _whole(value) for name, value in inputs.items()}))


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
    return torch.arange(_SAMPLE[0] * _SAMPLE[1], device="cpu").reshape(_SAMPLE) % tokens


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
    kind = _WHOLE.get(type(layer).__name__)
    if kind is None or not layer.is_initialized:
        return layer
    whole = getattr(caches, kind)()
    vars(whole).update({name: value for name, value in vars(layer).items() if name in vars(whole)})
    missing = layer.get_seq_length() - layer.keys.shape[-2]
    whole.keys, whole.values = (
        torch.nn.functional.pad(kept, (0, 0, missing, 0)) for kept in (layer.keys, layer.values)
    )
    return whole


def _fix_states(cache: Any) -> None:
    """Let a trace know that the states of a recurrent layer or a convolution have one size, but for the batch."""
    for layer in getattr(cache, "layers", ()):
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for state in states.values():
                for size in () if state is None else state.shape[1:]:
                    int(size)  # which makes a symbol a number


def _with_known_mask(forward: Callable[..., Any], example: Mapping[str, Any]) -> Callable[..., Any]:
    """Return ``forward`` with what is known of the mask: it has the rows of the ids, and a place for every key.

    Of itself a trace gives it sizes of its own. Where the mask of the example is otherwise, nothing is said of it.
    """
    is_known = _has_places(example)

    @functools.wraps(forward)
    def checked(*args: Any, **inputs: Any) -> Any:
        for value in inputs.values():
            _fix_states(value)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2:
            if is_known:
                assume(mask.shape[0] == ids.shape[0])
                assume(mask.shape[1] == _past(inputs) + ids.shape[1])
            with windows_by_position(mask):
                return forward(*args, **inputs)
        return forward(*args, **inputs)

    return checked


def _has_places(inputs: Mapping[str, Any]) -> bool:
    """Say whether the mask has a place for every key of the cache and every token."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return False
    return tuple(mask.shape) == (ids.shape[0], _past(inputs) + ids.shape[1])


def _past(inputs: Mapping[str, Any]) -> Any:
    """Return how many tokens the cache among the inputs holds."""
    caches = [v for v in inputs.values() if hasattr(v, "get_seq_length")]
    return caches[0].get_seq_length() if caches else 0

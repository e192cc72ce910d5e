"""Greedy text from what transformers' exporters export for generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from spinpass.errors import ConfigError

from .caches import cache_argument


def generate_exported(
    exported: Any, ids: Sequence[int], max_new_tokens: int, *, end: Collection[int] = ()
) -> list[int]:
    """Continue ``ids`` greedily with the components ``prefill`` and ``decode`` of an ``ExportedModel``.

    The cache that prefill returns is what decode is given, as it is: a rotated pair keeps it in the same basis. Returns
    the new tokens, an end token included.

    Raises:
        ConfigError: the prompt is empty, the limit is below 1, a component is missing, or decode takes no cache.
    """
    if not ids or max_new_tokens < 1:
        raise ConfigError(
            f"nothing to generate from {len(ids)} tokens up to {max_new_tokens} new ones: give at least one"
        )
    missing = {"prefill", "decode"} - set(exported.components)
    if missing:
        raise ConfigError(
            f"the exported model has the components {', '.join(exported.components)} and not {missing.pop()}: "
            "export it with export_for_generation"
        )
    kept = cache_argument(exported.components["decode"].metadata)
    if kept is None:
        raise ConfigError("the component decode takes no cache: export a model that has one with export_for_generation")
    tokens: list[int] = []
    cache, name, given = _empty_cache(exported.config), "prefill", list(ids)
    while True:
        metadata = exported.components[name].metadata
        returned = exported.runners[name](**_inputs(metadata, given, len(tokens) + len(ids), {kept: cache}))
        tokens.append(int(returned.logits[0, -1].argmax()))
        if tokens[-1] in end or len(tokens) == max_new_tokens:
            return tokens
        cache, name, given = getattr(returned, kept), "decode", tokens[-1:]


def _inputs(metadata: Any, ids: Sequence[int], length: int, cache: dict[str, Any]) -> dict[str, Any]:
    """Return what the component was traced with, out of ids, their positions, a mask over all ``length`` tokens and the
    cache."""
    positions = torch.arange(length - len(ids), length, device="cpu")
    known = cache | {
        "input_ids": torch.tensor([list(ids)], device="cpu"),
        "position_ids": positions[None],
        "cache_position": positions,
        "attention_mask": torch.ones(1, length, dtype=torch.int64, device="cpu"),
    }
    return {name: value for name, value in known.items() if name in metadata.kwargs}


def _empty_cache(config: Any) -> Any:
    """Make the cache that the components were traced with: its layers are there, without tokens."""
    from transformers import DynamicCache

    return DynamicCache(config=config)

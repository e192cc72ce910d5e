"""A language model of transformers as one program with a KV cache of fixed size inside: what ExecuTorch runs.

    logits (1, n, vocabulary) = f(input_ids (1, n), cache_position (n,)),   1 ≤ n ≤ context

Keys and values lie in buffers that the program updates at ``cache_position``; prompts and single tokens go through the
same graph. These are the inputs that ExecuTorch's own text runners give.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from spinpass.errors import ConfigError

_SAMPLE = 4  # tokens of the example
_PARTS = {"keys": "key_cache", "values": "value_cache", "cumulative_length": "cumulative_length"}


def export_static_cache(model: Any, context: int) -> ExportedProgram:
    """Export ``model`` (in eval mode, not changed) with a cache of ``context`` tokens, for one sequence.

    Raises:
        ConfigError: ``context`` is too small, longer than the positions the model has, or longer than the window of its
            attention, which a cache of fixed size cannot slide.
        ImportError: transformers is not installed or has no export for ExecuTorch.
        Exception: whatever tracing the model's own code raises.
    """
    config = model.config.get_text_config()
    check_context(context, config)
    settings = importlib.import_module("transformers").GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": context}
    )
    own, model.generation_config = model.generation_config, settings  # it asks for them there
    try:
        module = _with_cache_in_buffers()(model, batch_size=1, max_cache_len=context, device=model.device).eval()
    finally:
        model.generation_config = own
    tokens = Dim("tokens", min=1, max=context)
    inputs = {
        "input_ids": torch.arange(_SAMPLE, device="cpu")[None],
        "cache_position": torch.arange(_SAMPLE, device="cpu"),
    }
    with torch.no_grad():
        return torch.export.export(
            module, (), inputs, dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}}, strict=False
        )


def check_context(context: int, config: Any) -> None:
    """Raise ConfigError where a model of this configuration (of its text) takes no cache of so many tokens."""
    most = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None)
    if context <= _SAMPLE:
        raise ConfigError(f"a context of {context} tokens: at least {_SAMPLE + 1} are needed")
    if most is not None and context > most:
        raise ConfigError(f"a context of {context} tokens: the model has {most} positions")
    if window is not None and context > window and _slides(config):
        raise ConfigError(
            f"a context of {context} tokens: attention sees a window of {window}, which does not slide over a cache of "
            f"fixed size; choose at most {window}"
        )


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is None or any("sliding" in kind for kind in kinds)


def _with_cache_in_buffers() -> Any:
    """Return transformers' recipe, with the cache read from the module's buffers at every call: traced without dynamo,
    it would otherwise stay outside as constants."""
    recipe: Any = importlib.import_module("transformers.integrations.executorch").TorchExportableModuleWithStaticCache

    class StaticCacheModule(recipe):  # type: ignore[misc]  # a base known at run time
        def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
            for i, layer in enumerate(self.static_cache.layers):
                for part, buffer in _PARTS.items():
                    setattr(layer, part, getattr(self, f"{buffer}_{i}"))
            logits: torch.Tensor = super().forward(input_ids=input_ids, cache_position=cache_position)
            return logits

    return StaticCacheModule

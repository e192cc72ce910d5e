"""Tiny models with random weights of the kinds that decoders differ in, saved as a user has them.

What is long in real models is short here: windows of 16 tokens, so that a text of 40 goes past them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_BASE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_HEADS = _BASE | dict(head_dim=16)
_WINDOW = 16

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", _BASE),
    "windowed": ("Mistral", _BASE | dict(sliding_window=_WINDOW)),
    "every other layer windowed": ("Gemma3Text", _HEADS | dict(
        sliding_window=_WINDOW, layer_types=["sliding_attention", "full_attention"])),
    "sink": ("GptOss", _HEADS | dict(sliding_window=_WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "norms of queries and keys": ("Qwen3", _HEADS),
    "mixture of experts": ("Qwen3Moe", _HEADS | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)),
}  # fmt: skip
"""By kind, the family of transformers and its configuration."""


def save_tiny_model(kind: str, folder: Path) -> Any:
    """Build the model of a kind with weights that are all random, save it, and return it in eval mode."""
    family, config = KINDS[kind]
    made = getattr(transformers, f"{family}Config")(**config)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(made).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            plain = parameter.ndim == 1
            parameter.copy_(torch.rand(parameter.shape) * 0.5 + 0.75 if plain else torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(folder)
    return model

"""Tiny random mixtures of experts, one for each way in which transformers routes and multiplies."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

from tests.support.models import randomise

_COMMON: dict[str, Any] = dict(
    vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_LATENT = _COMMON | dict(
    num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    n_group=2, topk_group=1,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax first": ("Qwen3Moe", _COMMON | dict(head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)),
    "softmax of the chosen": ("Mixtral", _COMMON | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "not normalized": ("Olmoe", _COMMON | dict(num_experts=8, num_experts_per_tok=3)),
    "shared expert": ("Qwen2Moe", _COMMON | dict(moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=8, num_experts_per_tok=2)),
    "groups of experts": ("DeepseekV3", _LATENT),
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random model of the family in eval mode; ``config`` overrides entries of its configuration."""
    import transformers

    name, settings = FAMILIES[family]
    made = getattr(transformers, f"{name}Config")(**(settings | config))
    torch.manual_seed(0)
    return randomise(getattr(transformers, f"{name}ForCausalLM")(made).eval()).to(dtype)


@cache
def program(layers: int, implementation: str) -> ExportedProgram:
    """The first family with so many layers and its cache, its experts computed as named."""
    from transformers.exporters import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import decompose_for_generation

    model = build("softmax first", num_hidden_layers=layers)
    model.set_experts_implementation(implementation)
    ids = torch.arange(2 * 16).reshape(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decode, given = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    made: ExportedProgram = DynamoExporter().export(decode, given, DynamoConfig(dynamic=True)).program
    return made

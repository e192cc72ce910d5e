"""Shrinking a default configuration to a tiny one by a table of field names, without knowing the model.

Sizes are small, and different wherever an architecture allows it, so that no two axes agree by accident.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

VOCAB, HIDDEN, FF, EXPERT_FF, HEADS, KV_HEADS, HEAD_DIM = 160, 64, 96, 48, 4, 2, 16

Rule = Callable[[Any], Any]  # the default value of a field -> the tiny one
Overrides = Mapping[str, Mapping[str, Any]]  # model type -> fields that win over the rules


def always(value: Any) -> Rule:
    return lambda old: value


def if_set(value: Any) -> Rule:
    """The field switches something on: leave None alone."""
    return lambda old: None if old is None else value


def at_most(limit: int) -> Rule:
    return lambda old: None if old is None else min(old, limit)


def at_most_or(limit: int, missing: int) -> Rule:
    return lambda old: missing if old is None else min(old, limit)


def if_above(least: int, value: int) -> Rule:
    """A number that means "none" up to ``least``, and a real size above it."""
    return lambda old: value if isinstance(old, int) and old > least else old


def _table(*groups: tuple[Rule, str]) -> dict[str, Rule]:
    """Field name -> rule; a later group wins."""
    return {name: rule for rule, names in groups for name in names.split()}


RULES = _table(
    # widths
    (always(VOCAB), "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (if_set(VOCAB), "unpadded_vocab_size audio_vocab_size"),
    (
        always(HIDDEN),
        "hidden_size d_model n_embd emb_dim word_embed_proj_dim lru_width embedding_dim attention_hidden_size "
        "backbone_hidden_size dim",
    ),
    (
        always(FF),
        "intermediate_size ffn_dim dff d_inner encoder_ffn_dim decoder_ffn_dim dim_ff feed_forward_size "
        "intermediate_size_mlp dense_intermediate_size ffn_hidden_size",
    ),
    (if_set(FF), "n_inner prefix_dense_intermediate_size"),
    (
        if_set(EXPERT_FF),
        "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    # depth
    (
        always(2),
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_layers_per_stack depth global_attn_every_n_layers attn_layer_period "
        "expert_layer_period",
    ),
    (always(1), "attn_layer_offset expert_layer_offset"),
    # heads
    (
        always(HEADS),
        "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_heads",
    ),
    (always(KV_HEADS), "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
    (
        always(HEAD_DIM),
        "head_dim attention_head_size kv_channels d_head dim_head swa_head_dim v_head_dim qk_nope_head_dim "
        "index_head_dim indexer_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head "
        "mamba_head_dim mamba_headdim",
    ),
    (if_set(2 * HEAD_DIM), "global_head_dim"),
    (always(8), "rotary_dim qk_rope_head_dim"),
    # low ranks, indexers, linear attention
    (if_set(32), "q_lora_rank"),
    (always(24), "kv_lora_rank laurel_rank"),
    (
        always(4),
        "index_topk linear_num_value_heads linear_num_heads time_step_rank "
        "mamba_dt_rank d_rel",
    ),
    (always(12), "index_n_heads indexer_n_heads"),  # so many that no key is scored 0 by all: ties are chosen anyhow
    (always(2), "linear_num_key_heads indexer_kv_heads"),
    # experts
    (always(4), "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (
        at_most_or(2, missing=2),
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num moe_num_shared_experts "
        "num_shared_experts n_shared_experts",
    ),
    (if_set(2), "top_k_experts"),
    (if_above(1, 2), "n_group num_expert_group mamba_n_groups n_groups mamba_ngroups"),
    (at_most(1), "topk_group first_k_dense_replace num_dense_layers num_nextn_predict_layers"),
    # windows, states, chunks
    (
        if_above(0, 8),
        "sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention_window_len "
        "window_size keep_window_size rel_extent index_block_size",
    ),
    (if_above(0, 2), "index_topk_blocks"),
    (always(16), "local_attention state_size mamba_d_state ssm_state_size hidden_size_per_layer_input"),
    (always(8), "mamba_chunk_size chunk_size mamba_n_heads mamba_num_heads block_size"),
    (always(128), "mamba_d_ssm"),
    # positions and special tokens
    (
        always(80),  # more than the chunks of 64 tokens that are written into some models
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length",
    ),
    (always(64), "original_max_position_embeddings"),
    (if_set(0), "pad_token_id"),
    (if_set(1), "bos_token_id"),
    (if_set(2), "eos_token_id decoder_start_token_id"),
    # modes
    (always(True), "is_decoder"),
    (always(False), "use_cache"),
    # image and audio towers, unused by the text-only program but built
    (always(32), "image_size embed_dim"),
    (always(8), "patch_size"),
)

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
# Lists that are as long as the model is deep by accident only: indices of layers, not values per layer.
_INDICES = re.compile(r"idx|ids|indices|moe_layers|full_attn")
_PER_LAYER_SIZES = (("num_attention_heads", HEADS), ("key_value_heads", KV_HEADS), ("intermediate_size", FF))
_MANY, _MOST = 6, 8  # layers kept to show every combination of kinds; beyond, every kind once


def tiny_settings(config_class: Any, own: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Keyword arguments that make a tiny ``config_class``: every field that a rule names shrunk, lists with a value
    per layer cut to the layers that show every kind, sub-configurations likewise; ``own`` wins over all of it."""
    default = _default(config_class, own)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    subs = _sub_configs(config_class, default)
    count = next((n for n in _LAYER_COUNTS if n in fields), None)
    per_layer = _per_layer(default, fields, count)
    kept = _covering(list(per_layer.values())) if per_layer else []
    settings: dict[str, Any] = {}
    for name, field in fields.items():
        old = _value(default, field)
        if old is dataclasses.MISSING:
            continue
        if name in subs:
            made = _tiny_sub(subs[name], old, own.get(name), overrides)
            settings |= {} if made is None else {name: made}
        elif name in per_layer:
            settings[name] = _tiny_list(name, per_layer[name], kept)
        elif name in ("rope_parameters", "rope_scaling"):
            settings |= {name: tiny_rope(old)} if isinstance(old, dict) and old else {}
        elif name in RULES and (name == "eos_token_id" or not isinstance(old, (list, tuple, dict))):
            settings[name] = RULES[name](old)
    if "kv_lora_rank" in fields and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = HEADS  # a latent cache repeats nothing
    if kept and count is not None:
        settings[count] = len(kept)
    return settings | {k: v for k, v in own.items() if not (k in subs and isinstance(v, Mapping))}


def tiny_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings whose lengths fit heads of :data:`HEAD_DIM`."""
    tiny: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            value = tiny_rope(value)
        elif key == "original_max_position_embeddings":
            value = 32
        elif key == "mrope_section" and len(value) == 3:
            value = [2, 1, 1]
        elif key in ("short_factor", "long_factor"):
            value = list(value)[: HEAD_DIM // 2]
        tiny[key] = value
    return tiny


def _default(config_class: Any, own: Mapping[str, Any]) -> Any:
    try:
        return config_class()
    except Exception:  # some have no valid default: each fails in its own way, and the overrides say what it needs
        return config_class(**{k: v for k, v in own.items() if not isinstance(v, Mapping)})


def _sub_configs(config_class: Any, default: Any) -> Mapping[str, Any]:
    found = config_class.sub_configs
    return found if isinstance(found, Mapping) else getattr(default, "sub_configs", {})


def _value(default: Any, field: dataclasses.Field[Any]) -> Any:
    if field.name in vars(default):
        return vars(default)[field.name]
    try:
        return getattr(default, field.name)
    except Exception:  # an attribute that differs per layer refuses to be read as one, with an error of its own
        return field.default


def _tiny_sub(declared: Any, old: Any, own: Any, overrides: Overrides) -> Any:
    """A sub-configuration, shrunk by the same rules; None if there is none or its class is not known yet."""
    config_class = type(old) if hasattr(old, "to_dict") else declared
    if old is None or not dataclasses.is_dataclass(config_class):
        return None
    mine = {**overrides.get(getattr(config_class, "model_type", ""), {}), **(own if isinstance(own, Mapping) else {})}
    return config_class(**tiny_settings(config_class, mine, overrides))


def _per_layer(default: Any, fields: Mapping[str, Any], count: str | None) -> dict[str, list[Any]]:
    """The fields that hold one value per layer, where there are layers to leave out."""
    depth = getattr(default, count, None) if count else None
    if not isinstance(depth, int) or depth <= 2:
        return {}
    return {
        name: list(values)
        for name, values in vars(default).items()
        if name in fields and isinstance(values, (list, tuple)) and len(values) == depth and not _INDICES.search(name)
    }


def _tiny_list(name: str, values: Sequence[Any], kept: Sequence[int]) -> list[Any]:
    size = next((size for part, size in _PER_LAYER_SIZES if part in name), None)
    return [values[i] if size is None else size for i in kept]


def _covering(columns: Sequence[Sequence[Any]]) -> list[int]:
    """Layers, at least two, that between them show every combination of per-layer values; where that takes too many,
    every value once."""
    rows = [tuple(map(repr, row)) for row in zip(*columns)]
    kept = [i for i, row in enumerate(rows) if row not in rows[:i]]
    if len(kept) > _MANY:
        kept, seen = [], set[tuple[int, str]]()
        for i, row in enumerate(rows):
            if new := set(enumerate(row)) - seen:
                seen |= new
                kept.append(i)
        kept = kept[:_MOST]
    spare = (i for i in range(len(rows)) if i not in kept)
    return sorted(kept + [next(spare) for _ in range(2 - len(kept))])

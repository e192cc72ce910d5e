"""What generic shrinking cannot guess, and what is known about types: the model names of the project live here."""

from __future__ import annotations

from typing import Any

from .shrink import EXPERT_FF, FF, HEADS, HIDDEN

Settings = dict[str, Any]

_MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.05)
_SHARED_CACHE: Settings = dict(
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2
)
_ASSISTANT: Settings = dict(
    text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=4)
)
_MAMBA_AND_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]

# Model type -> settings. Three reasons: a mix of layers of which the default shows one kind only; sizes tied to each
# other; multipliers that a default configuration leaves at 1 and the released checkpoints do not.
OVERRIDES: dict[str, Settings] = {
    "bailing_hybrid": dict(layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=64, encoder_hash_byte_group_size=[3, 4]),
    "blt_local_decoder": dict(hidden_size_global=HIDDEN),
    "blt_local_encoder": dict(hidden_size_global=HIDDEN),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "dbrx": dict(
        attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=EXPERT_FF, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v4": dict(compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}),
    "dots1": dict(first_k_dense_replace=1),
    "dots3_note_text": dict(
        swa_num_attention_heads=HEADS, swa_num_key_value_heads=HEADS, swa_q_lora_rank=32, swa_kv_lora_rank=24,
        swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=16, head_dim=24,
    ),
    "electra": dict(embedding_size=32),
    "falcon_h1": dict(
        lm_head_multiplier=0.5, embedding_multiplier=3.0, mlp_multipliers=[0.8, 0.6], key_multiplier=0.7,
        attention_out_multiplier=0.9, attention_in_multiplier=1.1, ssm_multipliers=[0.9, 0.8, 0.7, 1.1, 1.2],
        ssm_in_multiplier=1.3, ssm_out_multiplier=0.4,
    ),
    "gemma3n_text": _SHARED_CACHE | dict(activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0], intermediate_size=[FF] * 4),
    "gemma4_assistant": _ASSISTANT,
    "gemma4_text": _SHARED_CACHE | dict(global_head_dim=32),
    "gemma4_unified_assistant": _ASSISTANT,
    "gemma4_unified_text": _SHARED_CACHE | dict(global_head_dim=32),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite": _MULTIPLIERS,
    "granite_swa": _MULTIPLIERS,
    "granitemoe": _MULTIPLIERS,
    "granitemoe_swa": _MULTIPLIERS,
    "granitemoehybrid": _MULTIPLIERS | dict(layer_types=["linear_attention", "full_attention"]),
    "granitemoeshared": _MULTIPLIERS,
    "hyperclovax": _MULTIPLIERS,
    "lfm2": dict(layer_types=["conv", "full_attention"], full_attn_idxs=[1]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "llama4_text": dict(
        interleave_moe_layer_step=2, moe_layers=None, num_hidden_layers=4, no_rope_layers=None, layer_types=None
    ),
    "longcat_flash": dict(head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=16),
    "mimo_v2_flash": dict(v_head_dim=8),
    "minimax": dict(
        full_attn_alpha_factor=1.5, full_attn_beta_factor=0.5, linear_attn_alpha_factor=1.2,
        linear_attn_beta_factor=0.7, mlp_alpha_factor=1.1, mlp_beta_factor=0.6,
    ),
    "olmo_hybrid": dict(linear_num_key_heads=4, linear_num_value_heads=4),
    "opt": dict(word_embed_proj_dim=32),
    "qwen4_exp_text": dict(
        hc_lowrank=16, ple_layer_ids=[1], ple_embed_dim=64, heads_per_ngram=2, ngram_vocab_size_base=64,
        split_ngram_parts=2, make_ngram_vocab_size_divisible_by=8, indexer_n_heads=4, indexer_kv_heads=1,
        indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2, eos_token_id=2,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        max_position_embeddings=64,
        attn_layers=["local", "lsh"], axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 48],
        local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_buckets=2, hash_seed=0,
    ),
    "rembert": dict(input_embedding_size=32, output_embedding_size=48),
    "roformer": dict(embedding_size=32),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        n_mamba_heads=2, attention_head_dim=32, attention_hidden_size=128, num_hidden_layers=4,
        layers_block_type=_MAMBA_AND_SHARED,
    ),
    "zamba2": dict(
        num_hidden_layers=4, layers_block_type=_MAMBA_AND_SHARED, num_mem_blocks=1, use_shared_attention_adapter=True,
        adapter_rank=8, use_mem_rope=True, attention_hidden_size=2 * HIDDEN, attention_head_dim=32,
        num_key_value_heads=HEADS,
    ),
}  # fmt: skip

# Switches of a configuration that change the graph a lot: "type@name" -> settings on top of the type's own.
SWITCHES: dict[str, Settings] = {
    "bloom@residual-after-norm": dict(apply_residual_connection_post_layernorm=True),
    "cohere@qk-norm": dict(use_qk_norm=True),
    "falcon@alibi": dict(alibi=True),
    "falcon@new": dict(new_decoder_architecture=True),
    "falcon@sequential": dict(parallel_attn=False, multi_query=False, num_kv_heads=HEADS, bias=True),
    "gemma4_text@experts": dict(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=EXPERT_FF
    ),
    "glm4_moe@qk-norm": dict(use_qk_norm=True),
    "gpt_neox@sequential": dict(use_parallel_residual=False),
    "llama@bias": dict(attention_bias=True, mlp_bias=True),
    "llama@tied": dict(tie_word_embeddings=True),
    "opt@post-norm": dict(do_layer_norm_before=False, word_embed_proj_dim=HIDDEN),
    "phi@qk-norm": dict(qk_layernorm=True),
    "qwen2@window": dict(
        use_sliding_window=True, sliding_window=8, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "stablelm@parallel": dict(use_parallel_residual=True, qk_layernorm=True),
}  # fmt: skip

# Types that transformers 5.23 and torch 2.13 do not turn into a program, and why: no fault of the pass.
NOT_EXPORTABLE: dict[str, str] = {
    "blt": "the patcher's lengths depend on the entropy of the bytes",
    "dbrx": "a Python loop over the experts that were hit",
    "gemma3n": "not built: its vision tower needs timm and PIL (gemma3n_text is here)",
    "gemma4_assistant": "not built: a draft head that reads another model's cache",
    "gemma4_unified_assistant": "not built: a draft head that reads another model's cache",
    "longcat_flash": "a Python loop over the experts that were hit",
    "qwen4_exp": "its sparse-attention indexer branches on the number of complete blocks",
    "qwen4_exp_text": "its sparse-attention indexer branches on the number of complete blocks",
    "reformer": "the mask's sum decides the length of a buffer",
}

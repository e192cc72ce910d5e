"""What transformers' ``generate`` knows and this package does not do: by name, what asks for nothing, and what to do.

``None`` always asks for nothing.
"""

from __future__ import annotations

from typing import Any

HARMLESS = frozenset((
    "use_cache", "cache_config", "max_cache_len", "early_stopping", "length_penalty", "renormalize_logits",
    "compile_config", "disable_compile", "low_memory", "prefill_chunk_size", "continuous_batching_config",
    "synced_gpus", "logits_to_keep", "bos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_lookbehind", "assistant_confidence_threshold",
    "assistant_ensemble_weight", "target_lookbehind", "max_matching_ngram_size", "transformers_version",
))  # fmt: skip
"""They change no token of one sequence that is followed without an assistant."""

_BEAM = "one sequence is followed at a time, greedily or by drawing"
_SCORES = "give its LogitsProcessor in logits_processor"
_SHOWN = "OrtDecoder.logits returns those of a text"
_ABSENT = "the file does not return them"
_CACHE = "the cache is as the file has it; export with --kv-cache for one of integers"
_CACHES = (
    "dynamic", "static", "offloaded", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked",
    "offloaded_hybrid", "offloaded_hybrid_chunked",
)  # fmt: skip
_NOTHING: tuple[Any, ...] = (0, [], ())

_GROUPS: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    (("num_beams", "num_beam_groups"), (1,), _BEAM),
    (
        ("diversity_penalty", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "use_mtp"),
        _NOTHING,
        _BEAM,
    ),
    (("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type"), _NOTHING, _BEAM),
    (("custom_generate",), (), _BEAM),
    (("typical_p", "guidance_scale", "encoder_repetition_penalty"), (1,), _SCORES),
    (("epsilon_cutoff", "eta_cutoff"), (0, 1), _SCORES),
    (("top_h", "exponential_decay_length_penalty", "sequence_bias", "watermarking_config"), (), _SCORES),
    (("suppress_tokens", "begin_suppress_tokens"), ([], ()), _SCORES),
    (("forced_bos_token_id", "forced_eos_token_id", "prefix_allowed_tokens_fn"), (), _SCORES),
    (("negative_prompt_ids", "negative_prompt_attention_mask"), (), _SCORES),
    (("encoder_no_repeat_ngram_size", "remove_invalid_values"), (0,), _SCORES),
    (("output_scores", "output_logits"), (0,), _SHOWN),
    (("output_attentions", "output_hidden_states"), (0,), _ABSENT),
    (("cache_implementation",), _CACHES, _CACHE),
    (("token_healing",), (0,), "cut the prompt where a token ends"),
    (("max_time",), (), "give a criterion in stopping_criteria"),
    (("position_ids",), (), "positions follow from attention_mask"),
    (("inputs_embeds",), (), "the file takes token ids"),
)

REFUSED = {name: (neutral, advice) for names, neutral, advice in _GROUPS for name in names}
"""By name, the values that ask for nothing, and what is said where another is given."""

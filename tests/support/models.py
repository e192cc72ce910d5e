"""Tiny random-weight decoders of transformers, no parameter trivial, and the ways users export them.

`build("llama")` gives a model, `export_plain`, `export_hf`, `export_hf_cache` and `export_hf_generation` give programs;
`NAMES` lists all models, `DECODERS` those without an encoder. transformers is imported on first use.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

# Sizes are pairwise different wherever an architecture allows it, so that no two axes agree by accident.
HIDDEN, FFN, HEADS, KV, HEAD_DIM, VOCAB, LAYERS, BATCH, SEQ = 48, 80, 4, 2, 16, 96, 2, 2, 7
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_WIDE = _COMMON | dict(head_dim=HEAD_DIM)  # 4 heads of 16 beside a hidden size of 48
_NO_GROUPS: dict[str, Any] = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_GPT: dict[str, Any] = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=FFN,
                            bos_token_id=1, eos_token_id=2)  # fmt: skip
_FALCON: dict[str, Any] = {k: v for k, v in _NO_GROUPS.items() if k != "intermediate_size"} | dict(ffn_hidden_size=FFN)
_WINDOW = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])

# name -> (model class, config class, config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _WIDE | dict(tie_word_embeddings=False)),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", _COMMON | dict(tie_word_embeddings=True)),
    "llama_bias": ("LlamaForCausalLM", "LlamaConfig", _WIDE | dict(attention_bias=True, mlp_bias=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _COMMON | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE),
    "mistral": ("MistralForCausalLM", "MistralConfig", _WIDE | dict(sliding_window=None)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _COMMON),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _WIDE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _WIDE | _WINDOW | dict(query_pre_attn_scalar=16)),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _WIDE | _WINDOW | dict(query_pre_attn_scalar=16)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NO_GROUPS | dict(use_parallel_residual=True)),
    "gpt_neox_sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NO_GROUPS | dict(use_parallel_residual=False)),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=FFN,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN, pad_token_id=0, do_layer_norm_before=True)),
    "falcon": ("FalconForCausalLM", "FalconConfig", _FALCON | dict(multi_query=True, parallel_attn=True, bias=False)),
    "falcon_new": ("FalconForCausalLM", "FalconConfig", _FALCON | dict(new_decoder_architecture=True, num_kv_heads=KV)),
    "falcon_alibi": ("FalconForCausalLM", "FalconConfig",
                     _FALCON | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _COMMON | dict(sliding_window=None)),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _COMMON | dict(use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm_parallel": ("StableLmForCausalLM", "StableLmConfig",
                          _COMMON | dict(use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5)),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", _COMMON),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _COMMON),
    "cohere": ("CohereForCausalLM", "CohereConfig", _COMMON | dict(logit_scale=0.25)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _COMMON | dict(embedding_multiplier=12.0,
                residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.05)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS,
              n_head=HEADS, bos_token_id=1, eos_token_id=2)),
    "phi": ("PhiForCausalLM", "PhiConfig", _COMMON | dict(partial_rotary_factor=0.5)),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT | dict(rotary_dim=8)),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", _GPT | dict(rotary_dim=8)),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(vocab_size=VOCAB, d_model=HIDDEN, d_kv=HEAD_DIM, d_ff=FFN,
           num_layers=LAYERS, num_heads=HEADS, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)),
}  # fmt: skip
NAMES = tuple(MODELS)
DECODERS = tuple(name for name in NAMES if name != "t5")


def build(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None, **config: Any
) -> nn.Module:
    """A randomised model in eval mode; `config` overrides entries of its tiny configuration."""
    import transformers

    model_class, config_class, settings = MODELS[name]
    made = getattr(transformers, config_class)(**(settings | config), attn_implementation=attention)
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, model_class)(made).eval()
    return randomise(model, seed).to(dtype)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that a wrong fold cannot hide behind: norm scales c·(1 + 0.3 z) (0.3 z for the
    (1 + w) kind), biases 0.1 z, tables z, matrices z/√fan_in; tied parameters stay tied."""
    generator = torch.Generator().manual_seed(seed)
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.copy_(_random_value(name, p, z, owners[id(p)]))
    return model


def _random_value(name: str, p: Tensor, z: Tensor, owner: nn.Module) -> Tensor:
    if name.endswith("bias"):
        return 0.1 * z
    if p.ndim <= 1 or "norm" in type(owner).__name__.lower():
        level = float(p.mean())
        return 0.3 * z if level == 0 else level * (1 + 0.3 * z)
    if isinstance(owner, nn.Embedding):
        return z
    fan_in = p.shape[0] if type(owner).__name__ == "Conv1D" else p.shape[-1]
    return z / math.sqrt(fan_in)


def sample_inputs(
    name: str = "", *, batch: int = BATCH, seq: int = SEQ, mask: bool = True, seed: int = 1
) -> dict[str, Tensor]:
    """Token ids (never the padding id), a mask with right padding in the second row; decoder ids for t5."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, VOCAB, (batch, seq), generator=generator)}
    if mask:
        inputs["attention_mask"] = torch.ones(batch, seq, dtype=torch.long)
        inputs["attention_mask"][1:, -2:] = 0
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, seq - 2), generator=generator)
    return inputs


def export_plain(
    model: nn.Module, inputs: Mapping[str, Tensor] | None = None, *, dynamic: bool = False
) -> ExportedProgram:
    """torch.export.export without cache; `dynamic` marks batch and sequence."""
    inputs = dict(inputs if inputs is not None else sample_inputs(mask=False))
    axes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs} | {"use_cache": None} if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (), inputs | {"use_cache": False}, dynamic_shapes=axes, strict=False)


def export_hf(model: nn.Module, inputs: Mapping[str, Tensor] | None = None, *, dynamic: bool = True) -> ExportedProgram:
    """transformers' DynamoExporter without cache."""
    from transformers.exporters import DynamoConfig, DynamoExporter

    inputs = dict(inputs if inputs is not None else sample_inputs())
    return _program(DynamoExporter().export(model, inputs | {"use_cache": False}, DynamoConfig(dynamic=dynamic)))


def export_hf_cache(model: nn.Module) -> ExportedProgram:
    """One graph with the cache as input and output that serves prefill and decode."""
    return export_hf_generation(model, multi_token_decode=True)["decode"]


def export_hf_generation(
    model: nn.Module, *, multi_token_decode: bool = False, static: bool = False
) -> dict[str, ExportedProgram]:
    """The graphs 'prefill' and 'decode' of transformers' export for generation; `static`: a cache of fixed size."""
    from transformers import GenerationConfig
    from transformers.exporters import DynamoConfig, DynamoExporter

    settings = GenerationConfig(cache_implementation="static", max_cache_len=16, do_sample=False) if static else None
    exported = DynamoExporter().export_for_generation(
        model, dict(sample_inputs(mask=False)), DynamoConfig(dynamic=not static), multi_token_decode=multi_token_decode,
        generation_config=settings,
    )  # fmt: skip
    return {name: _program(component) for name, component in exported.components.items()}


def _program(exported: Any) -> ExportedProgram:
    program = getattr(exported, "program", exported)
    assert isinstance(program, ExportedProgram)
    return program


def next_ids(steps: int) -> Tensor:
    """The ids that :func:`prefill_then_decode` feeds after the prompt, (BATCH, steps)."""
    return torch.randint(3, VOCAB, (BATCH, steps), generator=torch.Generator().manual_seed(7))


def cache_argument() -> str:
    """What the installed transformers calls the cache that a model takes and returns: another name since 5.24."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def prefill_then_decode(
    prefill: ExportedProgram, decode: ExportedProgram, *, steps: int = 3, float64: bool = True
) -> list[Tensor]:
    """Logits of the closed loop over two graphs: prefill the sample prompt, then decode fixed ids on the cache that the
    graphs themselves returned. Two pairs of graphs transformed apart are equivalent if all their logits are."""
    from spinpass.certificate.programs import run
    from spinpass.execution.interpreter import user_input_names

    prompt = sample_inputs(mask=False)["input_ids"]
    known = {
        "input_ids": prompt,
        "position_ids": torch.arange(SEQ).expand(BATCH, SEQ),
        "attention_mask": torch.ones_like(prompt),
    }
    logits, *cache = run(prefill, {name: known[name] for name in user_input_names(prefill)}, float64=float64)
    results = [logits]
    names = user_input_names(decode)
    for i, ids in enumerate(next_ids(steps).split(1, 1)):
        past = [name for name in names if name.startswith(f"{cache_argument()}_")]
        inputs = dict(zip(past, cache, strict=True)) | {
            "input_ids": ids,
            "position_ids": torch.full((BATCH, 1), SEQ + i),
        }
        inputs["attention_mask"] = torch.ones(BATCH, SEQ + i + 1, dtype=torch.long)
        logits, *cache = run(decode, {name: inputs[name] for name in names}, float64=float64)
        results.append(logits)
    return results

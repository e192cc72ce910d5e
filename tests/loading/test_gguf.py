"""GGUF files whose weights stay in them: the values that transformers loads, bit for bit, of every type and place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from spinpass.graph import Handle, values_of
from spinpass.loading import load_model, streamed
from spinpass.loading.gguf import GgufRows

HIDDEN, FFN, HEADS, KV, VOCABULARY, LAYERS = 64, 96, 4, 2, 96, 2
KEYS = {
    "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FFN, "block_count": LAYERS,
    "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0, "vocab_size": VOCABULARY,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.key_length": HIDDEN // HEADS, "attention.sliding_window": 16},
    "gemma3": {"attention.key_length": HIDDEN // HEADS, "attention.sliding_window": 16},
    "qwen3": {"attention.key_length": HIDDEN // HEADS},
    "qwen3moe": {
        "attention.key_length": HIDDEN // HEADS, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
    },
}  # fmt: skip


@pytest.fixture
def always_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the weights of tiny models stay in their files as well."""
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streamed, "_SMALL", 8)


def gguf_of(path: Path, architecture: str, kinds: tuple[str, ...], extra: Mapping[str, tuple[int, ...]] = {}) -> Path:
    """A file of random values, its matrices in each of the types in turn, and tensors that no parameter is made of."""
    import gguf
    import transformers
    from transformers import modeling_gguf_pytorch_utils as theirs

    def written(tensors: Mapping[str, tuple[int, ...]]) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        for key, value in (KEYS | MORE.get(architecture, {})).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
        generator = torch.Generator().manual_seed(0)
        for place, (name, shape) in enumerate(tensors.items()):
            values = torch.randn(shape, generator=generator).numpy()
            kind = gguf.GGMLQuantizationType[kinds[place % len(kinds)] if len(shape) > 1 else "F32"]
            if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                writer.add_tensor(name, values.astype("float16" if kind.name == "F16" else "float32"))
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    written({"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)})
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in theirs.get_gguf_hf_weights_map(model, processor).items():
        shape = shapes[parameter]
        if parameter.endswith("gate_up_proj"):  # two tensors in the file
            shape = (shape[0], shape[1] // 2, shape[2])
        found[name if name.endswith((".weight", ".bias")) else f"{name}.weight"] = shape
    written({**found, **extra})
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "qwen3moe"])
def test_a_streamed_program_has_the_values_of_a_loaded_one(
    always_streamed: None, tmp_path: Path, architecture: str, dtype: str
) -> None:
    path = gguf_of(tmp_path / "m.gguf", architecture, ("Q4_0", "F16", "Q8_0", "F32", "Q4_1", "BF16", "Q5_1"))
    lazy, plain = (load_model(path, dtype=dtype, streamed=s, cache=False) for s in (True, False))
    kept = [t for t in lazy.program.state_dict.values() if isinstance(t, Handle) and isinstance(t.source, GgufRows)]
    assert len(kept) > 4 * LAYERS
    assert lazy.program.state_dict.keys() == plain.program.state_dict.keys()
    for held in ("state_dict", "constants"):
        for key, tensor in getattr(plain.program, held).items():
            found = getattr(lazy.program, held)[key]
            assert tensor.dtype == found.dtype and torch.equal(values_of(found), tensor), key
    assert lazy.report == plain.report
    assert lazy.companions is not None and plain.companions is not None
    assert lazy.companions.config.to_dict() == plain.companions.config.to_dict()
    assert lazy.companions.generation_config.to_dict() == plain.companions.generation_config.to_dict()

"""GGUF files whose weights stay in them: the values that transformers loads, bit for bit, of every type and place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import spinpass
from spinpass.errors import ExportError
from spinpass.graph import Handle, values_of
from spinpass.loading import load_model, streamed
from spinpass.loading.gguf import GgufRows, GgufStack

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


def gguf_of(
    path: Path,
    architecture: str,
    kinds: tuple[str, ...],
    extra: Mapping[str, tuple[int, ...]] = {},
    declared: Mapping[str, Any] = {},
    folded: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, values: values,
) -> Path:
    """A file of random values, its matrices in each of the types in turn, perhaps folded, with some more tensors."""
    import gguf
    import transformers
    from transformers import modeling_gguf_pytorch_utils as theirs

    def written(tensors: Mapping[str, tuple[int, ...]]) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        for key, value in (KEYS | MORE.get(architecture, {})).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
        for key, value in declared.items():
            kind = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            kind[type(value)](f"prism.hadamard.{key}", value)
        generator = torch.Generator().manual_seed(0)
        for place, (name, shape) in enumerate(tensors.items()):
            values = folded(name, torch.randn(shape, generator=generator)).numpy()
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


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "auto"), ("gemma3", "bfloat16"), ("qwen3moe", "float32")],
)
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
    if architecture == "qwen3moe":
        stacks = [t for t in lazy.program.state_dict.values() if isinstance(t, Handle) and isinstance(t.source, GgufStack)]
        assert len(stacks) == LAYERS and torch.equal(stacks[0].read(torch.tensor([3, 1])), stacks[0].read()[[3, 1]])
        assert len([t for t in kept if t.ndim == 3]) == LAYERS
    assert lazy.report == plain.report
    assert lazy.companions is not None and plain.companions is not None
    assert lazy.companions.config.to_dict() == plain.companions.config.to_dict()
    assert lazy.companions.generation_config.to_dict() == plain.companions.generation_config.to_dict()


def test_a_tensor_that_no_parameter_is_made_of_is_told(always_streamed: None, tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "m.gguf", "llama", ("F32",), {"rope_freqs.weight": (8,)})
    assert load_model(path, streamed=True, cache=False).report.unused == ("rope_freqs.weight",)


def test_rows_are_read_alone(always_streamed: None, tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "m.gguf", "llama", ("Q4_1",))
    program = load_model(path, streamed=True, cache=False).program
    query = program.state_dict["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(query, Handle) and isinstance(query.source, GgufRows) and query.source.order is not None
    whole = query.read()
    assert torch.equal(query.read(slice(3, 9)), whole[3:9]) and query.read(slice(5, 5)).shape == (0, HIDDEN)
    some = torch.tensor([7, 0, 7, 33])
    assert torch.equal(query.read(some), whole[some]) and torch.equal(torch.cat(list(query.blocks())), whole)
    assert torch.equal(query.source.exact(slice(2, 4)), whole[2:4].double())


def test_values_that_are_no_numbers(always_streamed: None, tmp_path: Path) -> None:
    def broken(name: str, values: torch.Tensor) -> torch.Tensor:
        return torch.full_like(values, torch.nan) if name == "blk.1.ffn_up.weight" else values

    path = gguf_of(tmp_path / "m.gguf", "llama", ("F16",), folded=broken)
    with pytest.raises(ExportError, match=r"not every value of model\.layers\.1\.mlp\.up_proj\.weight is a finite number"):
        load_model(path, streamed=True, cache=False)


def test_types_whose_values_cannot_be_taken(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", numpy.zeros((2, 292), numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=r"1 tensors of the type Q8_K, such as blk\.0\.ffn_up\.weight, whose values"):
        load_model(path)


# -- declared bases ---------------------------------------------------------------------------------------------------

BLOCK = 32
SIGNS = {HIDDEN: torch.tensor([1, -1, -1, 1] * (HIDDEN // 4)), FFN: torch.tensor([1, 1, -1] * (FFN // 3))}
FOLDED = ["blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight", "output.weight"]
DECLARED: dict[str, Any] = {
    "version": 1, "block_size": BLOCK, "transform": "normalized-sylvester-walsh-hadamard", "axis": "input-last-dimension",
    "sign_mode": "explicit", "sign_widths": list(SIGNS), "sign_values": torch.cat(list(SIGNS.values())).tolist(),
    "weight_names": FOLDED, "inverse_weight_names": ["token_embd.weight"], "gdn_v_grouped": False,
}  # fmt: skip


def in_its_basis(name: str, values: torch.Tensor) -> torch.Tensor:
    """A weight as the format has it: that of x' = H (s · x), H by its definition, for which W' x' = W x."""
    if name not in (*FOLDED, "token_embd.weight"):
        return values
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(BLOCK)] for i in range(BLOCK)]).double()
    width = values.shape[1]
    turns = torch.block_diag(*[h / BLOCK**0.5] * (width // BLOCK)) @ torch.diag(SIGNS[width].double())
    return (values.double() @ torch.linalg.inv(turns)).float()


@pytest.mark.parametrize("streaming", [False, True])
def test_declared_bases_are_undone(tmp_path: Path, streaming: bool) -> None:
    plain = load_model(gguf_of(tmp_path / "plain.gguf", "llama", ("F32",)), cache=False)
    folded = gguf_of(tmp_path / "folded.gguf", "llama", ("F32",), declared=DECLARED, folded=in_its_basis)
    found = load_model(folded, cache=False, streamed=streaming)
    assert found.report.notes == ("6 weights are put back from the Hadamard bases they declare",)
    for name, expected in plain.program.state_dict.items():
        read = values_of(found.program.state_dict[name])
        assert torch.allclose(read, expected, rtol=0, atol=2e-6), name
    assert spinpass.verify(plain.program, found.program).ok
    result = spinpass.rotate(found.program, spinpass.RotationConfig(rotations="R1,R2", form="offline", tied="untie"))
    assert result.certificate is not None and result.certificate.ok


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, r"says prism\.hadamard\.version = 2, and 1 is known here"),
        ({"transform": "other"}, r"transform = 'other'"),
        ({"axis": "output"}, r"axis = 'output'"),
        ({"block_size": 48}, r"block_size = 48, no power of two"),
        ({"block_size": 64}, r"rows that do not consist of blocks of 64: blk\.0\.ffn_down\.weight"),
        ({"sign_mode": "other"}, r"sign_mode = 'other'"),
        ({"sign_mode": "identity"}, r"sign_mode = 'identity' with 160 signs"),
        ({"sign_values": [1] * 159}, r"with 159 signs for the widths \[64, 96\]"),
        ({"sign_values": [2] * 160}, r"with 160 signs"),
        ({"sign_widths": [64], "sign_values": [1] * 64}, r"no signs for rows as long as those of blk\.0\.ffn_down"),
        ({"weight_names": ["blk.9.attn_q.weight"]}, r"no such matrices or names them twice: blk\.9\.attn_q\.weight"),
        ({"weight_names": ["token_embd.weight"]}, r"names them twice"),
        ({"gdn_v_grouped": True}, r"gdn_v_grouped, for which inputs"),
        ({"more": 1}, r"prism\.hadamard\.more, which is not known here"),
    ],
)
def test_declared_bases_that_are_not_undone(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = gguf_of(tmp_path / "m.gguf", "llama", ("F32",), declared=DECLARED | change)
    with pytest.raises(ExportError, match=why) as caught:
        load_model(path)
    assert "export the model as it was before" in str(caught.value)

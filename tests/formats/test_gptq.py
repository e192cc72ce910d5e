"""GPTQ checkpoints: the layout as other tools read it, there and back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import packed_words
from spinpass.formats.gptq import read_gptq, write_gptq
from spinpass.operators import pack_words
from spinpass.quantization import Weights
from spinpass.quantization.report import QuantizedWeight
from spinpass.quantization.rounding.grid import Codes, rounded


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def weight(bits: int = 4, group: int | None = 16, symmetric: bool = True, seed: int = 0) -> QuantizedWeight:
    scheme = Weights(bits, group, symmetric, "rtn")
    return QuantizedWeight(rounded(normal(32, 64, seed=seed), scheme), 1, scheme, 0.0)


def shuffled(bits: int = 4, symmetric: bool = True) -> QuantizedWeight:
    """Groups of any columns, as act-order without static groups leaves them."""
    plain = weight(bits, 16, symmetric)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(5)) // 16
    return replace(plain, codes=replace(plain.codes, index=index))


def as_other_tools_read(folder: Path, module: str, bits: int, offset: int) -> Tensor:
    """(out, in) float32, by one long integer per column: nothing of the code that is tested."""
    stored = load_file(folder / "model.safetensors")
    qweight, qzeros = (stored[f"{module}.{part}"].to(torch.int64) & 0xFFFFFFFF for part in ("qweight", "qzeros"))
    scales, g_idx = stored[f"{module}.scales"].float(), stored[f"{module}.g_idx"].long()

    def values(stream: list[int], count: int) -> list[int]:
        total = sum(word << (32 * k) for k, word in enumerate(stream))
        return [total >> (bits * i) & (2**bits - 1) for i in range(count)]

    q = torch.tensor([values(column, len(g_idx)) for column in qweight.T.tolist()])
    zeros = torch.tensor([values(row, scales.shape[1]) for row in qzeros.tolist()]) + offset
    return (q - zeros.T[:, g_idx]) * scales.T[:, g_idx]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "per channel", "act-order"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_round_trip_keeps_every_value(tmp_path: Path, bits: int, kind: str, layout: str) -> None:
    made_of = {
        "symmetric": lambda: weight(bits),
        "asymmetric": lambda: weight(bits, symmetric=False),
        "per channel": lambda: weight(bits, None),
        "act-order": lambda: shuffled(bits, symmetric=False),
    }
    given = made_of[kind]()
    given = replace(given, codes=replace(given.codes, zeros=given.codes.zeros.clamp(min=1)))
    report = write_gptq(
        tmp_path, {"a.b.weight": given}, checkpoint_format=layout, scales_dtype=torch.float32, tensors={"n": normal(3)}
    )
    assert not report.changed and report.bytes == sum(f.stat().st_size for f in report.files)
    back = read_gptq(tmp_path)
    codes = back.codes["a.b.weight"]
    assert list(back.tensors) == ["n"] and back.config["desc_act"] == (kind == "act-order")
    assert torch.equal(codes.q, given.codes.q) and torch.equal(codes.zeros, given.codes.zeros)
    assert torch.equal(codes.dequantized(), given.codes.dequantized()) and codes.bits == bits
    assert codes.symmetric == given.codes.symmetric and (codes.index is None) == (kind != "act-order")
    expected = as_other_tools_read(tmp_path, "a.b", bits, 1 if layout == "gptq" else 0)
    assert torch.equal(expected, given.codes.dequantized())


def test_half_scales_change_values_and_the_report_says_so(tmp_path: Path) -> None:
    given = weight()
    report = write_gptq(tmp_path, {"a.weight": given})
    assert 0 < report.changed["a.weight"] < 2**-11
    codes = read_gptq(tmp_path).codes["a.weight"]
    assert codes.scales.dtype == torch.float16
    again = write_gptq(tmp_path / "again", {"a.weight": replace(given, codes=codes)})
    assert not again.changed
    assert torch.equal(read_gptq(tmp_path / "again").codes["a.weight"].dequantized(), codes.dequantized())


def test_mixed_settings_are_named_by_module(tmp_path: Path) -> None:
    given = {"a.weight": weight(), "b.weight": weight(seed=1), "c.weight": weight(8, None, seed=2)}
    write_gptq(tmp_path, given, config={"hidden_size": 64})
    config = json.loads((tmp_path / "config.json").read_text())
    found = config["quantization_config"]
    assert config["hidden_size"] == 64 and found == json.loads((tmp_path / "quantize_config.json").read_text())
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (4, 16, True, False)
    assert found["dynamic"] == {"+:^c$": {"bits": 8, "group_size": -1, "sym": True}}
    assert read_gptq(tmp_path).codes["c.weight"].bits == 8


def test_the_length_of_groups_is_that_of_all_but_the_last_and_a_head_is_declared(tmp_path: Path) -> None:
    scheme = Weights(4, 64, True, "rtn")
    uneven = QuantizedWeight(rounded(normal(32, 80), scheme), 1, scheme, 0.0)
    found = write_gptq(tmp_path, {"a.weight": uneven}).config
    assert (found["group_size"], found["desc_act"]) == (64, False) and "lm_head" not in found
    assert read_gptq(tmp_path).codes["a.weight"].group_length == 64
    assert write_gptq(tmp_path, {"a.weight": uneven, "lm_head.weight": weight()}).config["lm_head"] is True


def test_shards_and_missing_group_indices_are_read(tmp_path: Path) -> None:
    given = weight()
    write_gptq(tmp_path, {"a.weight": given}, scales_dtype=torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["a.g_idx"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()  # the older of the two is enough
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(stored)}
    for file in set(where.values()):
        save_file({n: t for n, t in stored.items() if where[n] == file}, tmp_path / file)
    save_file({"a.scales": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(read_gptq(tmp_path).codes["a.weight"].dequantized(), given.codes.dequantized())


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder, good = tmp_path / "new", weight()
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"a.weight": good}, {"checkpoint_format": "marlin"}, "'marlin' is not one of gptq, gptq_v2"),
        ({"a.weight": good}, {"scales_dtype": torch.bfloat16}, "bfloat16 is not float16 or float32"),
        ({"experts": good}, {}, "experts is not the weight of one linear layer"),
        ({"a.weight": replace(good, dim=2)}, {}, "a.weight is not the weight of one linear layer"),
        ({"a.weight": with_zeros(good, 0)}, {}, "zero point of 0"),
        ({"a.weight": with_scales(good, 1e-9)}, {}, "cannot hold; use scales_dtype"),
    ]
    narrow = QuantizedWeight(rounded(normal(32, 40), Weights(3, method="rtn")), 1, Weights(3), 0.0)
    cases.append(({"a.weight": narrow}, {}, "a.weight has 40 inputs of 3 bits"))
    for weights, options, why in cases:
        with pytest.raises(ConfigError, match=why):
            write_gptq(folder, weights, **options)
    assert not folder.exists()
    write_gptq(folder, {"a.weight": with_zeros(good, 0)}, checkpoint_format="gptq_v2")
    assert not read_gptq(folder).codes["a.weight"].zeros.any()


def with_zeros(weight: QuantizedWeight, value: int) -> QuantizedWeight:
    return replace(weight, codes=replace(weight.codes, zeros=torch.full_like(weight.codes.zeros, value)))


def with_scales(weight: QuantizedWeight, value: float) -> QuantizedWeight:
    return replace(weight, codes=replace(weight.codes, scales=torch.full_like(weight.codes.scales, value)))


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(name: str, change: Any = None, **config: Any) -> Path:
        folder = tmp_path / name
        write_gptq(folder, {"a.weight": weight()})
        stored = load_file(folder / "model.safetensors")
        if change is not None:
            change(stored)
        save_file(stored, folder / "model.safetensors")
        found = json.loads((folder / "config.json").read_text())
        found["quantization_config"].update(config)
        (folder / "config.json").write_text(json.dumps(found))
        return folder

    def fails(folder: Path, error: type[Exception], why: str) -> None:
        with pytest.raises(error, match=why):
            read_gptq(folder)

    fails(tmp_path / "nothing", ConfigError, "has no config.json with a quantization_config")
    fails(checkpoint("method", quant_method="awq"), ConfigError, "quantized by 'awq'")
    fails(checkpoint("format", checkpoint_format="marlin"), ConfigError, "in the format 'marlin'")
    fails(checkpoint("words", pack_dtype="int16"), ConfigError, "packed into int16")
    fails(checkpoint("torn", lambda t: t.pop("a.scales")), ExportError, "a has a qweight but no scales")
    fails(
        checkpoint("narrow", lambda t: t.update({"a.scales": torch.ones(4, 5)})), ExportError, "do not fit each other"
    )
    wild = torch.full((64,), 9, dtype=torch.int32)
    fails(checkpoint("wild", lambda t: t.update({"a.g_idx": wild})), ExportError, "g_idx names group 9 of 4")
    broken = checkpoint("broken")
    (broken / "model.safetensors").write_bytes(b"nonsense")
    fails(broken, ExportError, "its header of .* does not fit")
    (broken / "model.safetensors").unlink()
    fails(broken, ConfigError, "has no .safetensors file")
    (broken / "config.json").write_text("{")
    fails(broken, ExportError, "cannot be read as JSON")
    whole = checkpoint("whole")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    fails(whole, ExportError, "pip install safetensors")


def test_codes_are_packed_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces, the blocks that are asked for and the files: the same words."""
    codes = torch.randint(0, 8, (96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [pack_words(codes, 3, dim) for dim in (0, 1)]
    monkeypatch.setattr(packed_words, "_PIECE", 100)
    for dim, whole in enumerate(expected):
        source = packed_words.PackedWords(codes, 3, dim)
        assert source.shape == whole.shape and torch.equal(source.read(slice(None)), whole)
        for first in range(0, len(whole), 4):
            assert torch.equal(source.read(slice(first, first + 4)), whole[first : first + 4])
        assert torch.equal(source.read(torch.tensor([5, 0])), whole[[5, 0]]) and not len(source.read(slice(3, 3)))
    given = {f"{name}.weight": weight(seed=seed) for seed, name in enumerate("abc")}
    write_gptq(tmp_path, given, scales_dtype=torch.float32, shard_bytes=1000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    back = read_gptq(tmp_path).codes
    assert all(torch.equal(back[name].dequantized(), w.codes.dequantized()) for name, w in given.items())


def test_contiguous_codes_need_no_index() -> None:
    codes = weight().codes
    explicit = replace(codes, index=torch.arange(64) // 16)
    assert torch.equal(explicit.dequantized(), codes.dequantized())
    assert isinstance(explicit, Codes) and torch.equal(explicit.group_of, codes.group_of)

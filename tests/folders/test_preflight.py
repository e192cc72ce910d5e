"""What is said before a model is loaded: the text, the tokenizer, the tokens, the kernels, the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spinpass.errors import ConfigError, ExportError, ProgramError
from spinpass.folders import ExportRequest, Known, carry_out, check_space, making, preflight
from spinpass.loading import Source, count_values, locate
from spinpass.progress import Silent
from tests.support import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"), "llama")


def free(bytes_: int) -> Callable[[Path], Any]:
    return lambda _: type("Usage", (), {"free": bytes_})()


def values(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize(("stored", "integers"), [("bfloat16", False), ("bfloat16", True), ("float16", True), ("float16", False)])
def test_weights_that_openvino_cannot_take_are_named(model: Path, tmp_path: Path, stored: str, integers: bool) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": stored}))
    known = Known.of(str(tmp_path / "model"), dequantize=False, trust_remote_code=False)
    known.check_openvino("float32", integers=integers)
    if (stored, integers) == ("float16", False):
        return known.check_openvino("auto", integers=integers)
    with pytest.raises(ConfigError, match=f"the weights are stored in {stored}, which --to openvino cannot take: choose"):
        known.check_openvino("auto", integers=integers)


def test_values_are_counted_by_the_headers(model: Path, tmp_path: Path) -> None:
    assert count_values(locate(model)) == values(model)
    gguf = folders.gguf_file(tmp_path / "tiny.gguf")
    assert count_values(locate(gguf)) == 96 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32)


def test_codes_are_counted_by_their_bits(model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    groups = {"group_0": {"weights": {"num_bits": 4}}}
    for said, packed in (({"bits": 4}, 8), ({"bits": 8}, 4), ({"config_groups": groups}, 8)):
        config["quantization_config"] = {"quant_method": "gptq", **said}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({"w.qweight": torch.zeros(4, 16, dtype=torch.int32), "n.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
        assert count_values(locate(tmp_path)) == 4 * 16 * packed + 3


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{]"])
def test_a_file_without_a_header_is_not_counted(content: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert count_values(locate(tmp_path)) is None
    assert count_values(Source("transformers", "no-such/model")) is None


def test_the_disk_is_asked_for_what_will_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: 4 bytes a value. Where 4 bits are made of it, both lie on the disk for a while."""
    known, count = Known.of(str(model), dequantize=False, trust_remote_code=False), values(model)
    for dtype, bits, steps, needed in (
        ("float32", None, False, 4 * count),
        ("bfloat16", None, False, 2 * count),
        ("auto", None, False, 4 * count),
        ("float32", 4.0, True, 4 * count + count // 2),
        ("float32", 4.0, False, count // 2),
    ):
        monkeypatch.setattr(shutil, "disk_usage", free(needed))
        known.check_disk(tmp_path / "new" / "out", dtype, bits, floats=steps, codes=not steps)
        monkeypatch.setattr(shutil, "disk_usage", free(needed - 1))
        with pytest.raises(ExportError, match=rf"and {needed - 1:,} are free \(the disk is full"):
            known.check_disk(tmp_path / "new" / "out", dtype, bits, floats=steps, codes=not steps)
    monkeypatch.setattr(shutil, "disk_usage", free(1000))
    with pytest.raises(ExportError, match="about 900 bytes and 400 for what it is made of"):
        check_space(tmp_path, 900, 400)


@pytest.mark.parametrize(
    ("error", "options", "advice"),
    [
        (MemoryError(), {}, "--recipe quick"),
        (RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), {"recipe": "quick"}, "--samples 4"),
        (MemoryError(), {"bits": 16}, "--dtype auto"),
        (MemoryError(), {"bits": 16, "dtype": "auto"}, "take a machine with more"),
    ],
)
def test_too_little_memory_is_one_sentence_with_what_to_try(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, options: dict[str, Any], advice: str
) -> None:
    def met(*_: object, **__: object) -> None:
        raise ProgramError("node mm could not be run") from error

    monkeypatch.setattr(making, "load_model", met)
    with pytest.raises(ExportError, match=f"this machine's memory is not enough: .*{advice}"):
        asked(model, tmp_path / "out", **options)()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(making, "load_model", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        asked(model, tmp_path / "out", **options)()


def asked(model: Path, out: Path, **options: Any) -> Any:
    return lambda: carry_out(ExportRequest(str(model), out, None, **options), Silent())


def test_it_is_all_said_before_the_model_is_loaded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("spinpass.folders.making.load_model", loaded)
    text, short = tmp_path / "text.txt", tmp_path / "short.txt"
    text.write_text("what is the weather like " * 400)
    short.write_text("what is it")
    out = tmp_path / "out"
    calibrated = dict(quantize="w4", calibration=text)
    with pytest.raises(AssertionError, match="the model is loaded"):
        asked(model, out, **calibrated)()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        (calibrated | {"calibration": tmp_path / "none.txt"}, ConfigError, "no such file"),
        (calibrated | {"calibration": short}, ConfigError, "one window to calibrate on needs 512 tokens of .*, which has 3: choose a longer text with --calibration$"),
        (calibrated | {"calibration_windows": 5}, ConfigError, "--samples 5 needs 2,560 tokens"),
        (dict(bits=16, kv_cache="int8", calibration=text, dtype="float16"), ConfigError, "float32"),
    ]
    for options, kind, why in wrong:
        with pytest.raises(kind, match=why):
            asked(model, out, **options)()
    monkeypatch.setattr(shutil, "disk_usage", free(20_000))
    with pytest.raises(ExportError, match="the disk is full"):
        asked(model, out, bits=16)()
    assert not out.exists()


def test_windows_that_are_asked_for_are_all_taken_for_the_cache_too(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from spinpass.folders import making
    from spinpass.folders.onnx import CacheBits
    from spinpass.workers import Team

    text = tmp_path / "t"
    request = ExportRequest(str(model), tmp_path, None, bits=16, kv_cache="int8", calibration=text, calibration_windows=3)
    asked = making._Run(request, lambda: None, "", 3, None, None, Team())._cache_bits(text)  # type: ignore[arg-type, return-value]
    assert asked == CacheBits(8, text, 3)


def test_kept_codes_are_not_asked_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(Source("transformers", str(tmp_path)), None, False)
    monkeypatch.setattr(preflight, "count_values", lambda _: 100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", free(50_000_000 + 30_000_000))  # the result in four bits, and 30 MB
    with pytest.raises(ExportError, match="100,000,000 for what it is made of"):
        known.check_disk(tmp_path / "out", "float32", 4.0, floats=False, codes=True)
    known.check_disk(tmp_path / "out", "float32", 4.0, floats=False, codes=True, kept=70_000_000)

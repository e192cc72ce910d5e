"""What an export will take is foreseen by shapes, and what cannot fit is refused before anything is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spinpass import RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.folders import ExportRequest, Forecast, Known, Rates, Workload, export, making
from spinpass.folders.forecast import MARGIN, fitting
from spinpass.folders.machine import _left_in_groups, free_memory
from spinpass.loading import StoredModel, locate, stored_model
from spinpass.progress import Silent
from tests.support import folders


def llama(hidden: int, layers: int, inner: int, vocabulary: int) -> StoredModel:
    layer = [(hidden, hidden), (hidden // 4, hidden), (hidden // 4, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    shapes = (*layer * layers, (vocabulary, hidden), (hidden,))
    size = 2 * sum(a * b for a, b in (shape for shape in shapes if len(shape) == 2))
    return StoredModel(shapes, size, size > 100 << 20, ())


LARGE, SMALL = llama(4096, 32, 14336, 128_256), llama(256, 4, 512, 1000)


def work(stored: StoredModel, **asked: Any) -> Workload:
    request = ExportRequest("model", Path("out"), asked.pop("config", RotationConfig()), **asked)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=stored.shapes[-2][0]), dtype=torch.bfloat16)
    return Workload.of(request, stored, config)


GPTQ = {"quantize": "w4g128-gptq-a8-head8-embed8", "calibration_windows": 8}


def test_matrices_are_told_by_shape() -> None:
    found = work(llama(256, 4, 512, 1000), bits=16)
    assert found.tables == {(1000, 256): 1} and found.linears == {(256, 256): 8, (64, 256): 8, (512, 256): 8, (256, 512): 4}
    assert (found.table_values, found.hidden, found.vocabulary) == (256_000, 256, 1000)
    stack = StoredModel(((100, 32), (8, 64, 32)), 100, False, ())
    assert work(stack, bits=16).linears == {(64, 32): 8}, "experts one by one"


def test_what_stays_in_files_takes_no_memory_for_it() -> None:
    held, streamed = work(replace(LARGE, streams=False), bits=16), work(LARGE, bits=16)
    assert Forecast.of(held).memory_bytes > 2 * 4 * LARGE.values
    assert Forecast.of(streamed).memory_bytes < LARGE.values / 4
    assert Forecast.of(work(LARGE, bits=16, to="openvino")).memory_bytes >= 2 * 4 * LARGE.values, "which loads it"


def test_gptq_needs_the_square_of_the_widest_input() -> None:
    of_four_layers = Forecast.of(work(llama(4096, 4, 14336, 128_256), **GPTQ)).memory_bytes
    assert 16 * 14336**2 <= of_four_layers <= 2 * 16 * 14336**2
    longer = Forecast.of(work(llama(4096, 4, 14336, 128_256), **GPTQ | {"calibration_windows": 64})).memory_bytes
    assert longer - of_four_layers == pytest.approx(56 * 512 * 4 * (2 * 4096 + 4 * 14336), rel=0.01)


def test_time_goes_by_the_machine_and_the_weights() -> None:
    rates = Rates(38e9, 95e9, 20e9, 47e9, 1e9, 1.8e9, 0.13e9, 350e3)
    slower = Rates(**{name: rate / 2 for name, rate in rates.to_dict().items()})
    for stored in (SMALL, LARGE):
        assert Forecast.of(work(stored, **GPTQ), slower).seconds == pytest.approx(2 * Forecast.of(work(stored, **GPTQ), rates).seconds)
    steps = {step.name: step.seconds for step in Forecast.of(work(LARGE, **GPTQ), rates).steps}
    assert max(steps, key=lambda name: steps[name]) == "quantize" and steps["quantize"] > 3600, "hours on one core"


def test_steps_are_those_of_a_run(tmp_path: Path) -> None:
    told: list[str] = []
    foreseen: list[str] = []

    class Told(Silent):
        def expect(self, steps: Any, /) -> None:
            foreseen.extend(name for name, _ in steps)

        def start(self, name: str, /, unit: str = "") -> Any:
            told.append(name)
            return super().start(name, unit)

    model = folders.model_folder(tmp_path / "model")
    export(model, tmp_path / "out", RotationConfig(form="online"), quantize="w4g16-rtn-a8", steps=Told())
    told = [name.partition(" ")[0] if name.startswith("try ") else name for name in told]
    assert told == foreseen


def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folders.model_folder(tmp_path / "model")
    monkeypatch.setattr(making, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ExportError, match=r"needs about .* (GB|MB) of memory, give or take 30%, and 1 MB are allowed: take a machine with more"):
        export(model, tmp_path / "out", bits=16, memory="1MB")
    monkeypatch.setattr("spinpass.folders.preflight.free_memory", lambda: 2000)
    with pytest.raises(ExportError, match=r" 0 MB are free: .*--memory"):
        export(model, tmp_path / "out", bits=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ConfigError, match="--memory much is no size: write it as 12GB"):
        export(model, tmp_path / "out", bits=16, memory="much")


def test_the_setting_that_fits_is_named() -> None:
    whole = work(llama(1024, 256, 2816, 1000), bits=4)
    assert whole.scheme is not None and whole.scheme.weights is not None
    fine = replace(whole.scheme, weights=replace(whole.scheme.weights, group_size=16))
    whole = replace(whole, scheme=fine)  # whose training takes more than its widest Hessian, and than its file
    needed = Forecast.of(whole).least_bytes
    assert fitting(whole, needed - 1).startswith("--recipe quick")
    read = work(llama(4096, 4, 2048, 1000), **GPTQ | {"calibration_windows": 64})
    shorter = replace(read, tokens=8 * 512)
    assert fitting(read, Forecast.of(shorter).least_bytes) == "a shorter text, --samples 8"
    assert "--recipe plain" in fitting(read, Forecast.of(replace(read, tokens=512)).least_bytes - 1)
    assert fitting(read, 1) == ""


@pytest.mark.parametrize(("given", "size"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), (4096, 4096), ("8k", 8000)])
def test_sizes_are_read(given: str | int, size: int) -> None:
    assert ExportRequest("m", Path("o"), None, bits=16, memory=given).memory_bytes == size


def test_a_control_group_counts(tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "memory" / "jobs" / "one"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000")
    (group / "memory.usage_in_bytes").write_text("700")
    (group / "memory.stat").write_text("total_cache 300\ntotal_inactive_file 100\ntotal_active_file 50\n")
    (group.parent / "memory.limit_in_bytes").write_text("2000")
    (group.parent / "memory.usage_in_bytes").write_text("1900")
    process = tmp_path / "process"
    process.write_text("9:cpu:/jobs/one\n4:memory:/jobs/one\n0::/\n")
    assert list(_left_in_groups(tmp_path / "cgroup", process)) == [450, 100]
    newer = tmp_path / "newer" / "here"
    newer.mkdir(parents=True)
    (newer / "memory.max").write_text("max")
    (newer.parent / "memory.max").write_text("5000")
    (newer.parent / "memory.current").write_text("1000")
    process.write_text("0::/here\n")
    (newer.parent / "memory.stat").write_text("anon 500\ninactive_file 200\nactive_file 90\nslab_reclaimable 7\nslab 9\n")
    assert list(_left_in_groups(tmp_path / "newer", process)) == [4297]
    assert free_memory() > 1 << 20


def test_this_machine_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    found = Rates.measured(tmp_path / "file").to_dict()
    assert all(rate > 1000 for rate in found.values()) and found["gemm32"] > found["gemm64"]


def test_a_program_has_a_bound_from_below(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(bytes(4000))
    known = Known.of(str(tmp_path / "m.pt2"), dequantize=False, trust_remote_code=False)
    found = known.workload(ExportRequest(str(tmp_path / "m.pt2"), tmp_path / "out", RotationConfig(), bits=16))
    assert found is not None and found.values == 1000 and not Forecast.of(found).exact
    rotated = replace(found, values=10**9, stored=4 * 10**9)
    assert Forecast.of(rotated).memory_bytes < 1.1 * 2 * 4e9, "no constant is taken to be the whole program"


def test_an_error_within_the_margin_refuses_nothing() -> None:
    for target in ("onnx", "openvino"):
        foreseen = Forecast.of(work(LARGE, bits=4, recipe="plain", to=target))
        assert foreseen.least_bytes == int(foreseen.memory_bytes * (1 - MARGIN))


def test_integers_of_a_large_model_fit_where_their_file_does() -> None:
    """The runtime that tries the file has it twice, whichever process it is in."""
    plain = Forecast.of(work(LARGE, bits=4, recipe="plain"))
    assert plain.memory_bytes < plain.written_bytes < plain.runtime_bytes < 3 * plain.written_bytes


def test_a_file_that_no_runtime_can_hold_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for a larger machine; its certificate leaves the weights in the file."""
    whole = Forecast.of(work(LARGE, bits=16, dtype="float32"))
    assert whole.least_bytes < 4e9 < 1e10 < 4 * LARGE.values < whole.runtime_bytes
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr("spinpass.folders.room.free_memory", lambda: 1000)
    export(model, out, quantize="w4g16-rtn")
    about = json.loads((out / "spinpass.json").read_text())
    assert [(t["runtime"], t["tokens"]) for t in about["trials"]] == [("all", 0)]
    assert about["trials"][0]["reason"].startswith("ONNX Runtime takes about 0 MB for it, and 0 MB are free")
    assert about["card"].startswith("not scored: ONNX Runtime takes") and about["onnx"]["certificate"]["ok"]


def test_a_large_gguf_file_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folders.gguf_file(tmp_path / "tiny.gguf")
    asked = ExportRequest(str(path), tmp_path / "out", None, bits=16)
    known = Known.of(str(path), dequantize=False, trust_remote_code=False)
    small = known.workload(asked)
    assert small is not None and not small.streams
    monkeypatch.setattr("spinpass.loading.streamed.STREAMED_BYTES", 1000)
    large = known.workload(asked)
    assert large is not None and large.streams and Forecast.of(large).memory_bytes < Forecast.of(small).memory_bytes


def headed(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> StoredModel:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    found = stored_model(locate(folder))
    assert found is not None
    return found


def test_packed_weights_have_the_shape_of_what_they_stand_for(tmp_path: Path) -> None:
    """GPTQ's lie (in, out): its square counts the inputs, of which there are few."""
    parts = {"qweight": (64, 8192), "qzeros": (4, 1024), "scales": (4, 8192), "g_idx": (512,)}
    tensors = {f"layers.0.{name}": torch.zeros(shape, dtype=torch.float16 if name == "scales" else torch.int32) for name, shape in parts.items()}
    found = headed(tmp_path, tensors | {"norm.weight": torch.ones(3)}, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert sorted(found.shapes) == [(3,), (8192, 512)]


def test_experts_that_are_put_together_are_few_tensors_in_memory(tmp_path: Path) -> None:
    tensors = {f"layers.{k}.experts.{n}.up.weight": torch.zeros(32, 16, dtype=torch.float16) for k in range(2) for n in range(8)}
    others = {f"layers.{k}.sub.{n}.weight": torch.zeros(16, 16, dtype=torch.float16) for k in range(2) for n in range(3)}
    found = headed(tmp_path, tensors | others, {"text_config": {"num_local_experts": 8}, "experts_kind": [1]})
    assert sorted(found.shapes) == sorted([(8, 32, 16)] * 2 + [(16, 16)] * 6) and found.merged == 2 * 8 * 32 * 16 * 2
    asked = ExportRequest(str(tmp_path), tmp_path / "out", None, bits=16)
    made = Workload.of(asked, replace(found, streams=True))
    assert made.tensors == 8 and made.linears[32, 16] == 16
    assert Forecast.of(made).memory_bytes - Forecast.of(replace(made, merged=0)).memory_bytes == found.merged


def test_what_another_device_holds_takes_no_memory_of_this_one() -> None:
    here = work(llama(4096, 4, 14336, 1000), **GPTQ)
    there = replace(here, elsewhere=True)
    steps = [{step.name: step.bytes for step in Forecast.of(each).steps} for each in (here, there)]
    assert steps[0]["quantize"] > 4e9 > 1e9 > steps[1]["quantize"] and not Forecast.of(there).exact

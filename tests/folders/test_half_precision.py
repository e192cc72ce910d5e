"""Folders in half precision: float16 is written, certified and says what the program says; bfloat16 is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from spinpass import RotationConfig
from spinpass.errors import ExportError
from spinpass.folders import export, making
from spinpass.runtime import NoKernelError, OrtDecoder, OrtModel
from tests.support import experts
from tests.support.folders import model_folder, tokenizer
from tests.support.sweeps import quick

NEW = 16
IDS = torch.randint(3, 90, (1, 17), generator=torch.Generator().manual_seed(1))
FAMILIES = {"fused attention": dict(hidden_size=64), "heads of another size": {}, "experts": None}


def source(how: str, path: Path) -> Path:
    if how != "experts":
        return model_folder(path, **FAMILIES[how])
    experts.build("softmax first").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def own_tokens(path: Path, dtype: torch.dtype) -> list[int]:
    """What transformers writes greedily in that dtype."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return made[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("how", quick(FAMILIES, only=["fused attention"]))
def test_float16_folders_write_the_programs_own_text(how: str, tmp_path: Path) -> None:
    path, out = source(how, tmp_path / "model"), tmp_path / "out"
    written = export(path, out, RotationConfig(), dtype="float16", bits=16)
    certificate = written.report.certificate
    assert certificate is not None and certificate.ok and not written.report.uncertified
    assert written.report.hadamards > 0, "R3 and R4 in float16 are what this is about"
    assert (written.report.fused.attention > 0) == (how != "heads of another size")
    session = ort.InferenceSession(str(out / "model.onnx"))
    floats = {v.type for v in (*session.get_inputs(), *session.get_outputs()) if "float" in v.type}
    assert floats == {"tensor(float16)"}
    expected = own_tokens(path, torch.float16)
    assert list(OrtDecoder(out).generate(IDS[0].tolist(), NEW, end=[]).tokens) == expected
    batch = OrtModel.from_pretrained(out).generate(IDS.expand(2, -1), max_new_tokens=NEW, eos_token_id=[])
    assert [row[IDS.shape[1] :] for row in batch.tolist()] == [expected, expected]


def test_genai_runs_a_float16_folder(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    path, out = source("fused attention", tmp_path / "model"), tmp_path / "out"
    export(path, out, RotationConfig(), dtype="float16", bits=16)
    model = genai.Model(str(out))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=IDS.shape[1] + NEW, min_length=IDS.shape[1] + NEW)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(IDS[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    got = generator.get_sequence(0)[IDS.shape[1] :]
    expected = own_tokens(path, torch.float16)
    ends = json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(expected) if token in ends), NEW)
    assert list(got)[:stop] == expected[:stop]


def test_bfloat16_is_refused_by_name_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = source("fused attention", tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr(making, "rotated", lambda *a, **k: pytest.fail("it was rotated first"))
    with pytest.raises(ExportError, match="no kernel for MatMul in bfloat16 on a CPU.*--dtype float32 or float16.*--no-verify"):
        export(path, out, RotationConfig(), dtype="bfloat16", bits=16)
    assert not out.exists()


@pytest.mark.slow
def test_bfloat16_is_written_for_who_insists(tmp_path: Path) -> None:
    path, out = source("fused attention", tmp_path / "model"), tmp_path / "out"
    written = export(path, out, RotationConfig(), dtype="bfloat16", certify=False, bits=16)
    assert written.report.certificate is None
    with pytest.raises(NoKernelError, match="lacks a kernel on CPUExecutionProvider"):
        OrtDecoder(out)

"""Every example runs and shows what it promises."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from tests.support import folders

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES.with_name("benchmarks")
SHOWN = {
    "transform_a_module": ["R1:residual", "equivalent: relative error", "max |difference of the logits| in float32:"],
    "lower_for_others": ["operators of aten, spinpass have become operators of aten\n", "max |difference of the logits| in float32:"],
    "refuse_with_reason": ["aten::clamp does not commute with a rotation", "R1 is ", "'online'", "nothing was rotated"],
    "onnx_export": ["6 online Hadamards", "equivalent: at worst logits", "ONNX Runtime on the rotated file"],
    "own_rotation_matrix": ["learned(48)", "random-hadamard(5 blocks of 16, seed 7)", "is not orthogonal"],
    "prefill_and_decode": ["same bases: True", "after prefill and decode: "],
    "transformers_exporter": ["decode: 11 spaces rotated, 4 rotated cache outputs", "12 of 12 tokens are those of the original model"],
    "executorch_qwen": ["7 linear layers on 4-bit integers", "equivalent: at worst", "12 of 12 tokens are the same"],
}


def test_every_example_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SHOWN, "decoder", "demo"}  # decoder.py is the module that the others share


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("executorch"):
        pytest.importorskip("executorch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for text in SHOWN[name]:
        assert text in printed
    for line in printed.splitlines():
        if "difference" in line:
            assert float(line.split()[-1]) < 1e-5


def test_demo_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders.model_folder(tmp_path / "model")
    monkeypatch.setattr(topics, "topics", {"short": "what is the weather like if it is on " * 200})
    options = ["--model", str(folder), "--windows", "2", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    assert not exit_.value.code
    data = json.loads(capsys.readouterr().out)
    original, nearest, ours = data["models"]
    assert [row["bits"] for row in data["models"]] == [16, 4, 4]
    assert [row["recipe"] for row in data["models"]] == ["plain", "plain", "auto"]
    for row in data["models"]:
        assert Path(row["folder"], "model.onnx").is_file() and Path(row["folder"], "tokenizer.json").is_file()
        assert len(row["answers"]) == 5 and row["decode_tokens_per_second"] > 0 and (row["card"] is None or row["card"]["kl"] >= 0)
        assert set(row["texts"]) == {"help texts", "code"} and row["texts"]["code"]["perplexity"] > 1
    assert original["texts"]["code"]["mean"] == 0 and nearest["texts"]["code"]["mean"] != 0
    assert max(nearest["bytes"], ours["bytes"]) < original["bytes"]

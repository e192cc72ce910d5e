"""Every example runs and shows what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "01_rotate_a_module": ["R1:residual", "equivalent: relative error", "max |difference of the logits| in float32:"],
    "02_read_a_refusal": ["aten::clamp does not commute with a rotation", "R1 is ", "'online'", "nothing was rotated"],
    "03_quantize": ["original, w4-gptq-a4: error", "rotated,  w4-gptq-a4: error", "14 weights are rounded"],
    "04_export_to_onnx": ["6 online Hadamards", "equivalent: at worst logits", "ONNX Runtime on the rotated file"],
    "05_own_matrices": ["learned(48)", "random-hadamard(5 blocks of 16, seed 7)", "is not orthogonal"],
    "06_prefill_and_decode": [
        "decode: 11 spaces rotated, 4 rotated cache outputs", "same bases: True", "12 of 12 tokens are those of the original model",
    ],
    "07_lower_for_others": ["operators of aten, spinpass have become operators of aten\n", "max |difference of the logits| in float32:"],
    "08_executorch": ["7 linear layers on 4-bit integers", "equivalent: at worst", "12 of 12 tokens are the same"],
}  # fmt: skip
MOST_LINES = 62


def test_every_example_is_tested_listed_and_short() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SHOWN, "decoder"}  # decoder.py is the module that the others share
    assert [name[:2] for name in sorted(SHOWN)] == [f"{number:02}" for number in range(1, 9)]
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([^)]+)\)", index)
    assert listed == [*(f"{name}.py" for name in sorted(SHOWN)), "decoder.py"]
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, f"{path.name} is no short script"


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name.endswith("executorch"):
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
    if name == "03_quantize":
        original, rotated = re.findall(r"error ([\d.]+)", printed)
        assert float(rotated) < 0.7 * float(original)

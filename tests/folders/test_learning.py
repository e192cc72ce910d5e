"""``--learn`` and ``--minutes``: what a folder has learned, what is said of it, and what means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

from spinpass import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import read_text, windows, windows_between
from spinpass.folders import ExportRequest, export
from tests.support import folders
from tests.support.commands import run
from tests.support.sweeps import quick


def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(folders.WORDS[(i * i + i // 7) % len(folders.WORDS)] for i in range(2500)))
    return file


@pytest.mark.parametrize("how", quick(["local", "full"], only=["full"]))
def test_a_folder_learns_and_says_so(how: str, tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model")
    asked = ["--bits", 4, "--recipe", "quick", "--samples", 2, "--calibration", text(tmp_path)]
    told = {}
    for name in ("none", how):
        made = run("export", model, tmp_path / name, *asked, "--learn", name)
        assert made.exit_code == 0, made.stderr
        told[name] = json.loads((tmp_path / name / "spinpass.json").read_text())
    assert told["none"]["quantization"]["learning"] is None
    learning = told[how]["quantization"]["learning"]
    assert set(learning["kinds"]) | set(learning["dropped"]) == {"scales", "gains"}
    assert learning["inputs"] == 8 and learning["steps"] > 35, "three rounds through all of the text, of each block or all"
    assert "learn" in made.stderr and "the divergence went from" in made.stdout
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("none", how)]
    kinds = [[n.op_type for n in onnx.load(tmp_path / name / "model.onnx").graph.node] for name in ("none", how)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and kinds[0] == kinds[1], "the same kernels"
    if learning["kept"]:
        assert learning["after"] < learning["before"]
        assert (tmp_path / "none" / "model.onnx").read_bytes() != (tmp_path / how / "model.onnx").read_bytes()
    assert yaml.safe_load((tmp_path / how / "recipe.yaml").read_text())["learn"] == how


def test_keys_and_channels_are_balanced_before_they_have_four_bits(tmp_path: Path) -> None:
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "out"
    scheme, found = "w4-asym-rtn-a4-kv4", {}
    asked = ("--quantize", scheme, "--form", "online", "--calibration", text(tmp_path), "--samples", 2)
    made = run("export", model, out, *asked, "--learn", "full", "--minutes", 0.02)
    assert made.exit_code == 0, made.stderr
    told = json.loads((out / "spinpass.json").read_text())
    bases = told["learned_bases"]
    assert sorted([*bases["kinds"], *bases["dropped"]]) == ["balanced channels", "balanced keys"]
    for space in told["plan"]["spaces"]:
        found.setdefault(space["rotation"], set()).add(space["matrix"].partition("(")[0])
    scaled = "scaled-hadamard" if "balanced channels" in bases["kinds"] else "hadamard"
    assert found["R1"] == {scaled} and found["R4"] == {"hadamard"}
    assert ("gates" in found) is (scaled == "scaled-hadamard"), "folded into the operand of the gate"
    assert found["R3"] == {"kronecker" if "balanced keys" in bases["kinds"] else "hadamard"}
    assert yaml.safe_load((out / "recipe.yaml").read_text())["learn"] == "full"


def test_minutes_ask_for_it_and_bound_it(tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model")
    options: dict[str, Any] = {"bits": 4, "calibration": text(tmp_path), "calibration_windows": 2, "minutes": 0.02}
    made = export(model, tmp_path / "out", **options).manifest["quantization"]["learning"]
    assert 4 <= made["steps"] < 100 and {*made["kinds"], *made["dropped"]} == {"scales", "gains"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "all"}, "learn='all' is not one of None, none, local, full"),
        ({"learn": "none", "minutes": 5.0}, "--learn none and --minutes disagree"),
        ({"minutes": 0.0}, "--minutes 0.0: choose more than 0"),
        ({"bits": 16, "learn": "full"}, "--learn full is of rounded weights: add --bits or --quantize"),
        ({"bits": 16, "learning_seed": 1}, "--learning-seed 1: nothing is learned here"),
        ({"learn": "none", "learning_seed": 1}, "--learning-seed 1: nothing is learned here"),
        ({"learning_seed": -1}, "--learning-seed -1: choose an integer from 0 on"),
        ({"int4": True, "minutes": 5.0}, "--minutes 5.0 is of rounded weights"),
        ({"quantize": "a8", "learn": "local"}, "--learn local is of rounded weights"),
        ({"recipe": "plain", "learn": "full"}, "--recipe plain rounds to nearest without a text: leave it or --learn full out"),
    ],
)
def test_what_learns_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExportRequest("m", Path("out"), RotationConfig(), **options)
    assert message in str(refused.value)


def test_what_is_asked_for_reaches_the_scheme() -> None:
    def learn(**options: Any) -> Any:
        scheme = ExportRequest("m", Path("out"), RotationConfig(), **options).scheme
        assert scheme is not None
        return scheme.learn

    assert learn().kinds == ("scales",) and learn(learn="none") is None and learn(recipe="quick") is None
    assert learn(learn="local").phases == ("local",) and learn(minutes=3.0).minutes == 3.0
    assert learn(learning_seed=2).seed == 2 and learn(learn="full", learning_seed=2).seed == 2
    assert learn(minutes=3.0).phases == ("full",) and learn(quantize="w4g32-rtn", learn="full").kinds == ("scales", "gains")


def test_windows_that_decide_are_not_those_that_score() -> None:
    ids = list(range(len(read_text(None)) // 4))
    scored, judged = windows(ids, 512, 8), windows_between(ids, 256, 8)
    assert not {i for each in scored for i in each} & {i for each in judged for i in each}
    assert len(judged) == 8 and {len(each) for each in judged} == {256}
    with pytest.raises(ConfigError, match="8 windows"):
        windows_between(ids[:100], 256, 8)

"""Recipes are what they say, for every runtime, and the file that one makes is scored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from spinpass import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import SHIPPED_TEXT
from spinpass.folders import BITS, ExportRequest, card_lines, export, recipe_of
from spinpass.folders.card import WINDOWS
from spinpass.formats.pt2 import save_program
from spinpass.quantization import QuantizationConfig
from tests.support import folders, programs
from tests.support.commands import run


@pytest.mark.parametrize("to", ["onnx", "executorch", "gptq"])
@pytest.mark.parametrize("name", ["auto", "quick", "plain"])
@pytest.mark.parametrize("bits", BITS)
def test_every_recipe_is_a_request_that_means_something(to: str, name: str, bits: int) -> None:
    try:
        recipe = recipe_of(name, bits, to)
    except ConfigError as error:
        assert to == "executorch" and bits in (3, 2) and "no kernel" in str(error)
        return
    assert (recipe.config is None) == (name == "plain")
    if bits == 16:
        assert not recipe.scheme
        return
    scheme = QuantizationConfig.parse(recipe.scheme)
    assert scheme.weights is not None and round(scheme.average_bits or scheme.weights.bits) == bits
    assert scheme.needs_calibration == (name != "plain")
    request = ExportRequest("m", Path("out"), RotationConfig(), to=to, bits=bits, recipe=name)  # type: ignore[arg-type]
    assert request.quantize == recipe.scheme and request.config == recipe.config
    assert request.calibration == (SHIPPED_TEXT if name != "plain" else None)
    assert request.calibration_windows == recipe.windows


def test_what_is_given_counts_more_than_a_recipe() -> None:
    mine = RotationConfig(form="online", rotations=("R1", "R4"))
    assert ExportRequest("m", Path("out"), mine, bits=4).config == mine
    assert ExportRequest("m", Path("out"), None, bits=4).config is None
    given = ExportRequest("m", Path("out"), RotationConfig(), bits=4, calibration=Path("t.txt"), calibration_windows=3)
    assert (given.calibration, given.calibration_windows) == (Path("t.txt"), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 is not one of 16, 8, 4, 3, 2"),
        ({"bits": 4, "recipe": "best"}, "recipe='best' is not one of auto, quick, plain"),
        ({"recipe": "plain"}, "--recipe plain is of a number of bits: add --bits"),
        ({"bits": 4, "quantize": "w4-rtn"}, "--bits 4 and --quantize both say how to round"),
        ({"bits": 4, "int4": True}, "--bits 4 and --int4 both say how to round"),
        ({"keep": ("*",)}, "--keep and --layer are of layers that are quantized: add --bits or --quantize"),
        ({"bits": 4, "layers": (("*.o_proj.*", "w8-a8"),)}, "--layer *.o_proj.*=w8-a8: name weights alone"),
        ({"bits": 4, "layers": (("*.o_proj.*", "q8"),)}, "'q8' in 'q8' is not a part of a scheme"),
        ({"bits": 2, "to": "executorch"}, "--to executorch has no kernel for 2 bits: choose one of 8, 4"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExportRequest("m", Path("out"), RotationConfig(), **options)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_the_written_file_is_scored(tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model")
    made = {}
    for name in ("quick", "plain"):
        export(model, tmp_path / name, bits=4, recipe=name, calibration_windows=2 if name == "quick" else None)
        manifest = json.loads((tmp_path / name / "spinpass.json").read_text())
        made[name] = manifest["card"]
        size = (tmp_path / name / "model.onnx").stat().st_size
        assert made[name]["bytes"] == size and made[name]["windows"] == WINDOWS
        assert math.isfinite(made[name]["ratio"]) and 0 < made[name]["agreement"] <= 1
        assert made[name]["kl"] > 0 and made[name]["decode"] > 0
        first, second = card_lines(made[name])
        assert f"perplexity × {made[name]['ratio']:.4f}" in first and "bits per weight" in second
    assert made["quick"]["kl"] < made["plain"]["kl"]
    assert card_lines(None) == [] and card_lines("not scored: why") == ["not scored: why"]


def test_a_program_without_a_tokenizer_is_not_scored(tmp_path: Path) -> None:
    save_program(programs.program("llama_tied", "cache", torch.float32), tmp_path / "model.pt2")
    manifest = export(tmp_path / "model.pt2", tmp_path / "out", bits=16).manifest
    assert manifest["card"] == "not scored: there is no tokenizer to read a text with"


def test_layers_are_kept_or_rounded_otherwise(tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model")
    options = ["--bits", "4", "--recipe", "plain", "--keep", "*.down_proj.*", "--layer", "*.o_proj.*=w8g16-gptq"]
    made = run("export", model, tmp_path / "out", *options, "--samples", 2)
    assert made.exit_code == 0, made.stderr
    told = json.loads((tmp_path / "out" / "spinpass.json").read_text())["quantization"]
    widths = {name: weight["bits"] for name, weight in told["weights"].items()}
    assert not [name for name in widths if "down_proj" in name] and "excluded" in told["kept"].values()
    assert {bits for name, bits in widths.items() if "o_proj" in name} == {8}
    assert {bits for name, bits in widths.items() if "q_proj" in name} == {4}
    for wrong, why in (("*.oproj.*=w8", "the nearest is"), ("w8", "is not PATTERN=SCHEME")):
        refused = run("export", model, tmp_path / "no", "--bits", "4", "--recipe", "plain", "--layer", wrong)
        assert refused.exit_code == 2 and why in refused.stderr and not (tmp_path / "no").exists()

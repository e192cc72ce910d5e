"""Rotated checkpoints as integers and with online rotations declared: what loaders of such folders compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spinpass
from spinpass.cli.app import app
from spinpass.errors import ConfigError, VerificationError
from spinpass.evaluation import ProgramScorer
from spinpass.folders import layout_trial, layouts, rotate_checkpoint
from spinpass.formats import read_gptq, write_compressed_tensors
from spinpass.loading import load_model, reloaded_logits, streamed
from tests.support import folders

IDS = list(range(3, 23))
ALL = spinpass.RotationConfig(rotations=("R1", "R2", "R3", "R4"), form="offline", tied="untie")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def declared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("declared")
    rotate_checkpoint(model, out, ALL, quantize="w8g16-rtn", layout="compressed-tensors", force=True)
    return out


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return ProgramScorer(load_model(folder, cache=False, **options).program).logits(IDS)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_integers_are_those_of_the_route_in_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed, and as ``export --to gptq`` writes them: the same codes."""
    folded = ("--rotations", "R1,R2", "--form", "offline", "--tied", "untie")
    other = CliRunner().invoke(
        app, ["export", str(model), str(tmp_path / "other"), "--to", "gptq", "--quantize", "w4g16-gptq", *folded]
    )
    assert other.exit_code == 0, other.stderr
    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streamed, "_SMALL", 8)
    _, written = rotate_checkpoint(model, tmp_path / "out", quantize="w4g16-gptq")
    assert [trial["runtime"] for trial in written.manifest["trials"]] == ["spinpass"]
    first, second = (read_gptq(tmp_path / name) for name in ("other", "out"))
    assert first.codes.keys() == second.codes.keys() and len(first.codes) == 14
    for name, codes in first.codes.items():
        assert torch.equal(codes.dequantized(), second.codes[name].dequantized()), name
    assert not (tmp_path / ".out.spinpass").exists(), "codes that were kept are gone"


def test_the_folder_declares_what_is_online(model: Path, declared: Path) -> None:
    config = json.loads((declared / "config.json").read_text())["quantization_config"]
    groups = config["transform_config"]["config_groups"]
    assert {a["location"] for group in groups.values() for a in group["apply"]} == {"input", "q_attn", "k_cache"}
    assert groups["hadamard80"]["apply"][0]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    original, read = logits(model), logits(declared, dequantize=True)
    assert 1e-6 < distance(read, original) < 2e-2, "eight bits are near, and not the floats themselves"
    assert "apply_declared_transforms" in (declared / "README.md").read_text()


def test_the_package_and_transformers_compute_the_same(declared: Path) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    expected = logits(declared, dequantize=True)
    assert distance(reloaded_logits(declared, IDS), expected) < 1e-5
    plain = transformers.AutoModelForCausalLM.from_pretrained(declared, dtype="auto")
    if not hasattr(plain, "transform_config"):  # transformers leaves them out: another function
        assert distance(plain(input_ids=torch.tensor([IDS])).logits[0].detach(), expected) > 0.1


def test_the_declaration_stands_in_what_is_exported(declared: Path) -> None:
    cached = load_model(declared, dequantize=True).program
    assert sum("hadamard" in str(node.target) for node in cached.graph.nodes) == 6
    again = spinpass.transform(cached, spinpass.RotationConfig(rotations=("R1", "R2"), form="offline", tied="untie"))
    assert spinpass.verify(cached, again).ok


def test_what_is_online_already_is_not_lost(declared: Path, tmp_path: Path) -> None:
    """The weights of such a folder alone are another model, whoever has written its declaration."""
    given = tmp_path / "in"
    given.mkdir()
    for file in declared.iterdir():
        (given / file.name).write_bytes(file.read_bytes())
    config = json.loads((given / "config.json").read_text())
    del config["spinpass"]
    (given / "config.json").write_text(json.dumps(config))
    (given / "spinpass.json").unlink()
    for rotations in ("none", "R2"):
        arguments = ["export", str(given), str(tmp_path / "out"), "--to", "gptq", "--dequantize"]
        made = CliRunner().invoke(app, [*arguments, "--quantize", "w8g16-rtn", "--rotations", rotations])
        assert made.exit_code == 2 and "rotated online already" in made.stderr
    assert not (tmp_path / "out").exists()


def test_integers_are_rotated_when_their_values_may_be_taken(model: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "integers", tmp_path / "out"
    options = ("--to", "gptq", "--quantize", "w8g16-rtn", "--rotations", "none")
    made = CliRunner().invoke(app, ["export", str(model), str(given), *options])
    assert made.exit_code == 0, made.stderr
    for name, arguments in {"rotate-checkpoint": [given, out], "verify": [given, out]}.items():
        command = [name, *map(str, arguments)]
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2 and "add --dequantize" in refused.stderr
        done = CliRunner().invoke(app, [*command, "--dequantize"])
        assert done.exit_code == 0, done.stderr
    assert "are the original's in the 3 declared bases" in done.stdout
    assert distance(logits(out), logits(given, dequantize=True)) < 1e-5


def test_floats_with_online_rotations_need_no_option(model: Path, tmp_path: Path) -> None:
    block = {role: spinpass.Override(block_size=4) for role in ("R3", "R4")}
    config = spinpass.RotationConfig(rotations=("R3", "R4"), overrides=block)
    rotate_checkpoint(model, tmp_path, config, layout="compressed-tensors", force=True)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "dense" and list(entry["transform_config"]["config_groups"]) == ["hadamard4"]
    assert distance(logits(tmp_path), logits(model)) < 1e-5


@pytest.mark.parametrize("change", ["undeclared", "without its partner", "of another module"])
def test_another_declaration_is_refused(declared: Path, tmp_path: Path, change: str) -> None:
    for file in declared.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((declared / "config.json").read_text())
    groups = config["quantization_config"]["transform_config"]["config_groups"]
    if change == "undeclared":
        groups.clear()
    elif change == "without its partner":
        groups["hadamard12"]["apply"] = groups["hadamard12"]["apply"][:1]
    else:
        groups["hadamard80"]["apply"][0]["targets"] = ["model.layers.5.mlp.down_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "spinpass.json").unlink()
    with pytest.raises(ConfigError, match="does not declare|not rotated alike|which the model has not"):
        load_model(tmp_path, cache=False, dequantize=True)


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_a_wrong_declaration_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Of a large model, too, which is not loaded as a whole."""
    monkeypatch.setattr(layout_trial, "STREAMED_BYTES", size)

    def wrong(folder: Path, weights: Any, transforms: Any, **options: Any) -> Any:
        return write_compressed_tensors(folder, weights, [t for t in transforms if "layers.0" not in t.module], **options)

    monkeypatch.setattr(layouts, "write_compressed_tensors", wrong)
    config = spinpass.RotationConfig(rotations=("R4",))
    with pytest.raises(VerificationError, match="declare another rotation of input of model.layers.0.mlp.down_proj"):
        rotate_checkpoint(model, tmp_path / "out", config, layout="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_integers_are_read_back_without_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model no more is loaded than a weight at a time; one that differs, is missing or left over is named."""
    monkeypatch.setattr(layout_trial, "STREAMED_BYTES", 0)
    result, written = rotate_checkpoint(model, tmp_path / "out", quantize="w4g16-rtn")
    (trial,) = written.manifest["trials"]
    assert not trial["tokens"] and "read back" in trial["reason"] and result.quantization is not None
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {**result.quantization.weights}
    good = weights[name]
    first = good.codes.q.clone()
    first[0, 0] ^= 1
    off = {
        "integers of": replace(good.codes, q=first),
        "scales of": replace(good.codes, scales=good.codes.scales * 1.01),
    }
    layout_trial.read_back("gptq", tmp_path / "out", weights)
    for what, codes in off.items():
        with pytest.raises(VerificationError, match=f"the {what} {name} in the files"):
            layout_trial.read_back("gptq", tmp_path / "out", weights | {name: replace(good, codes=codes)})
    with pytest.raises(VerificationError, match="the files have no integers of other"):
        layout_trial.read_back("gptq", tmp_path / "out", weights | {"other.weight": good})
    del weights[name]
    with pytest.raises(VerificationError, match="are not those that it was rounded to"):
        layout_trial.read_back("gptq", tmp_path / "out", weights)


def test_what_means_nothing_is_refused_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layout": "marlin"}, "is not one of transformers, gptq, compressed-tensors"),
        ({"layout": "gptq"}, "holds integers: add --quantize"),
        ({"layout": "transformers", "quantize": "w4-rtn"}, "holds floats: leave out --quantize"),
        ({"config": ALL}, "R4"),
        ({"quantize": "w4-rtn-a8"}, "holds weights alone"),
        ({"quantize": "w4-rtn-a8", "layout": "compressed-tensors"}, "a compressed-tensors checkpoint holds weights alone"),
        ({"quantize": "w3.5g16-rows"}, "one width each"),
        ({"quantize": "w4-rtn-embed8"}, "leave the part embed… out"),
        ({"quantize": "a8"}, "holds rounded weights"),
        ({"quantize": "w4-rtn", "calibration": __file__}, "rounds without a text"),
        ({"keep": ("*",)}, "are of weights that are quantized"),
        ({"calibration_windows": 3}, "--samples 3"),
    ]  # fmt: skip
    for options, why in cases:
        with pytest.raises(ConfigError, match=why):
            rotate_checkpoint(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    alone = spinpass.RotationConfig(rotations=("R2",))
    with pytest.raises(ConfigError, match="nothing is quantized, and nothing is rotated online"):
        rotate_checkpoint(model, tmp_path / "out", alone, layout="compressed-tensors")


def test_the_command(model: Path, tmp_path: Path) -> None:
    arguments = ["rotate-checkpoint", str(model), str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*arguments, "--block-size", "16"])
    assert refused.exit_code == 2 and "add R3 or R4" in refused.stderr
    online = ("--layout", "compressed-tensors", "--rotations", "R1,R4", "--block-size", "16", "--quantize", "w8-rtn")
    made = CliRunner().invoke(app, [*arguments, *online, "--json"])
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["layout"] == {"name": "compressed-tensors", "transforms": 2}

"""Recipes are what they say, for every runtime, and the file that one makes is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml

from spinpass import Override, RotationConfig
from spinpass.errors import ConfigError, VerificationError
from spinpass.evaluation import CALIBRATION_WINDOWS, SHIPPED_TEXT, ProgramScorer, own_tokens
from spinpass.exporters.onnx.operators.rounding import TOKENS
from spinpass.folders import BITS, ExportRequest, card_lines, export, making, recipe_of, result
from spinpass.folders import card as folder_card
from spinpass.folders import onnx as folder_onnx
from spinpass.folders.card import WINDOWS
from spinpass.folders.making import preflight
from spinpass.folders.recipes import DEFAULT_BITS
from spinpass.folders.settings import settings_of
from spinpass.formats.pt2 import save_program
from spinpass.quantization import QuantizationConfig
from tests.support import folders, models, programs
from tests.support.commands import run


@pytest.mark.parametrize("to", ["onnx", "openvino", "executorch", "gptq"])
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
    assert (scheme.activations is None) == (to in ("openvino", "gptq"))
    assert scheme.weights is not None and round(scheme.average_bits or scheme.weights.bits) == bits
    assert scheme.needs_calibration == (name != "plain")
    request = ExportRequest("m", Path("out"), RotationConfig(), to=to, bits=bits, recipe=name)  # type: ignore[arg-type]
    assert request.quantize == recipe.scheme and request.config == recipe.config
    assert request.calibration == (SHIPPED_TEXT if name != "plain" else None)
    assert request.most_windows == (recipe.windows or CALIBRATION_WINDOWS) and request.calibration_windows is None


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
        ({"recipe": "plain", "quantize": "w4-rtn"}, "--recipe plain and --quantize both say how to round"),
        ({"compare": True, "recipe": "plain"}, "--compare is of a rotated model and its original, both rounded, and this is the original"),
        ({"compare": True, "bits": 16}, "and this is in floats"),
        ({"bits": 16, "recipe": "quick"}, "--recipe quick is a way to round, and --bits 16 keeps the values"),
        ({"recipe": "plain", "calibration_windows": 4}, "--samples 4: nothing here reads a text: leave it out"),
        ({"calibration": ""}, "--calibration '' names no text"),
        ({"bits": 4, "quantize": "w4-rtn"}, "--bits 4 and --quantize both say how to round"),
        ({"bits": 4, "int4": True}, "--bits 4 and --int4 both say how to round"),
        ({"bits": 16, "keep": ("*",)}, "--keep and --layer are of layers that are quantized: add --bits or --quantize"),
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
        left = [node.op_type for node in onnx.load(tmp_path / name / "model.onnx").graph.node]
        assert TOKENS not in left and left.count("MatMulNBits") == 15, "the kernels round, of the head too"
        first, second = card_lines(made[name])
        assert f"perplexity × {made[name]['ratio']:.4f}" in first and "bits per weight" in second
    assert made["quick"]["kl"] < made["plain"]["kl"]
    assert card_lines(None) == [] and card_lines("not scored: why") == ["not scored: why"]


def test_a_program_without_a_tokenizer_is_not_scored(tmp_path: Path) -> None:
    save_program(programs.program("llama_tied", "cache", torch.float32), tmp_path / "model.pt2")
    manifest = export(tmp_path / "model.pt2", tmp_path / "out", recipe="plain").manifest
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


@pytest.mark.parametrize(
    "options",
    [
        ["--layer", "model.norm.weight=w8"],
        ["--keep", "model.norm.weight"],
        ["--keep", "*down_proj*", "--layer", "*down_proj*=w8"],
        ["--layer", "*lm_head*=w8", "--layer", "*lm_head*=w4"],
    ],
)
def test_patterns_that_change_nothing_are_refused(tmp_path: Path, options: list[str]) -> None:
    model = folders.model_folder(tmp_path / "model")
    refused = run("export", model, tmp_path / "out", "--recipe", "plain", "--no-verify", *options)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and ("can be rounded; the nearest is" in said or "changes nothing" in said or "is given twice" in said), said
    assert not (tmp_path / "out").exists()


def test_a_table_is_kept_or_rounded_otherwise(tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model", "llama")
    widths = {}
    for name, options in (("kept", ["--keep", "*embed_tokens*"]), ("four", ["--layer", "*embed_tokens*=w4g16-rtn"])):
        assert run("export", model, tmp_path / name, "--recipe", "plain", *options).exit_code == 0
        told = json.loads((tmp_path / name / "spinpass.json").read_text())["quantization"]["weights"]
        widths[name] = told.get("model.embed_tokens.weight", {}).get("bits")
    assert widths == {"kept": None, "four": 4}


@pytest.mark.parametrize("recipe", ["plain", "quick"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_widths_that_blocks_do_not_divide(name: str, recipe: str, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    model = folders.model_folder(tmp_path / "model", name, hidden_size=50, intermediate_size=77, **heads)
    made = export(model, tmp_path / "out", recipe=recipe, calibration_windows=2 if recipe == "quick" else None)  # type: ignore[arg-type]
    assert made.manifest["card"]["kl"] < 0.2 and made.manifest["packed"]["tables"] == 1


def equal(part: str) -> Callable[[torch.nn.Module], None]:
    def change(model: Any) -> None:
        layers, parts = model.model.layers, model.model.layers[0].self_attn
        if part == "layers":
            layers[1].load_state_dict(layers[0].state_dict())
        elif part == "head and table":
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        elif part == "keys and values":
            parts.v_proj.weight.copy_(parts.k_proj.weight)
        else:
            for layer in layers:
                layer.mlp.down_proj.weight.zero_()

    return change


@pytest.mark.parametrize("part", ["layers", "head and table", "keys and values", "zeros"])
def test_weights_that_are_equal(tmp_path: Path, part: str) -> None:
    """An exporter makes one constant of them."""
    model: Any = models.build("llama")
    with torch.no_grad():
        equal(part)(model)
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "out", recipe="plain")
    assert made.manifest["card"]["ratio"] > 0 and made.manifest["quantization"]["weights"].keys() >= {
        "lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    }  # fmt: skip


def test_logits_that_no_exponential_holds(tmp_path: Path) -> None:
    model: Any = models.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    card = export(tmp_path / "model", tmp_path / "out", recipe="plain").manifest["card"]
    assert (isinstance(card, str) and card.startswith("not scored: ")) or math.isfinite(card["ratio"])


def test_a_file_whose_predictions_are_no_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = folder_card.compare

    def broken(*given: Any) -> Any:
        found = compared(*given)
        return replace(found, after=replace(found.after, losses=(math.nan, *found.after.losses[1:])))

    monkeypatch.setattr(folder_card, "compare", broken)
    with pytest.raises(VerificationError, match="predictions of Python's help texts are no numbers"):
        export(folders.model_folder(tmp_path / "model"), tmp_path / "out", recipe="plain")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["plain", "quick"])
def test_layers_that_onnx_multiplies_by_gemm_get_integers(recipe: str, tmp_path: Path) -> None:
    """And a model of few positions is scored on windows that it holds."""
    model = folders.model_folder(tmp_path / "model", "gpt2")
    made = run("export", model, tmp_path / "out", "--recipe", recipe, *(("--samples", 2) if recipe == "quick" else ()))
    assert made.exit_code == 0, made.stderr
    assert "stay in floats" not in made.stdout
    assert json.loads((tmp_path / "out" / "spinpass.json").read_text())["card"]["length"] == 64
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 9 and not {"Gemm", TOKENS} & set(kinds), "four of each layer, and the head"


# -- the default, what it leaves to the user, and what it saves --------------------------------------------------------


def test_four_bits_are_the_default_and_a_scheme_stands_in_their_place() -> None:
    request = ExportRequest("m", Path("out"), RotationConfig())
    assert request.bits == DEFAULT_BITS == 4 and request.quantize == recipe_of("auto", 4, "onnx").scheme
    given = ExportRequest("m", Path("out"), RotationConfig(), quantize="w8-rtn")
    assert given.bits is None and given.config == RotationConfig()


def test_a_folder_is_made_again_by_its_own_settings(tmp_path: Path) -> None:
    """Byte for byte; and what the command line says counts more."""
    model = folders.model_folder(tmp_path / "model")
    first = run("export", model, tmp_path / "a", "--recipe", "quick", "--samples", 2, "--keep", "*.o_proj.*", "--seed", 3, "--kind", "random-hadamard")
    assert first.exit_code == 0, first.stderr
    settings = tmp_path / "a" / "recipe.yaml"
    told = yaml.safe_load(settings.read_text())
    assert told == {
        "rotations": "R1,R2,R3,R4,latent", "form": "auto", "kind": "random-hadamard", "seed": 3, "samples": 2,
        "quantize": recipe_of("quick", 4, "onnx").scheme, "keep": ["*.o_proj.*"], "last-logits": True,
    }
    again = run("export", model, tmp_path / "b", "--config", settings)
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
    other = run("export", model, tmp_path / "c", "--config", settings, "--quantize", "w8-rtn", "--all-logits", "--rotations", "R2")
    assert other.exit_code == 0, other.stderr
    told = yaml.safe_load((tmp_path / "c" / "recipe.yaml").read_text())
    assert (told["quantize"], told["rotations"], told["seed"]) == ("w8-rtn", "R2", 3) and "last-logits" not in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(("--recipe", "plain"), {"rotations": "none", "quantize": recipe_of("plain", 4, "onnx").scheme}, marks=pytest.mark.slow),
        pytest.param(("--int4", "--rotations", "none"), {"rotations": "none", "int4": True}, marks=pytest.mark.slow),
        pytest.param(("--bits", 16), {"rotations": "R1,R2,R3,R4,latent", "form": "auto", "bits": 16}, marks=pytest.mark.slow),
        pytest.param(("--recipe", "quick", "--samples", 1), {"rotations": "R1,R2,R4,latent", "form": "online", "samples": 1}, marks=pytest.mark.slow),
        (("--int4", "--rotations", "R2"), {"rotations": "R2", "int4": True}),
        (("--quantize", "w8-gptq-a8"), {"rotations": "R1,R2", "form": "online", "quantize": "w8-gptq-a8", "samples": 2}),
        (("--recipe", "plain", "--kv-cache", "int8"), {"rotations": "none", "samples": 2, "kv-cache": "int8"}),
    ],
)
def test_another_way_to_round_beside_settings(tmp_path: Path, given: Sequence[object], expected: dict[str, object]) -> None:
    """Takes the place of the one in the file, with what belongs to it: a recipe its rotations, no text its windows."""
    model = folders.model_folder(tmp_path / "model", head_dim=16)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 200)
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"rotations: R1,R2\nform: online\nquantize: w4g16-gptq-a8\nsamples: 2\ncalibration: {text}\nno-verify: true\nkind: random-hadamard\nseed: 3\nkeep: '*.o_proj.*'\n")
    made = run("export", model, tmp_path / "out", "--config", settings, *given)
    assert made.exit_code == 0, made.stderr
    told = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    expected = expected | {"no-verify": True}
    assert {name: told.get(name) for name in expected} == expected
    assert ("seed" in told) == ("--quantize" in given or "R2" in given), "a recipe has no rotation of the file"
    assert ("calibration" in told) == ("samples" in told) == ("samples" in expected)


def test_a_recipe_takes_what_its_text_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as many windows as are asked for, or none."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 300)
    monkeypatch.setattr("spinpass.folders.request.SHIPPED_TEXT", text)
    model = folders.model_folder(tmp_path / "model")
    request = ExportRequest(str(model), tmp_path / "out", RotationConfig(), recipe="quick")
    assert preflight(request)[1] == 3
    with pytest.raises(ConfigError, match="--samples 4 needs 2,048 tokens of .*: choose a longer text with --calibration, --samples 3 at most"):
        preflight(ExportRequest(str(model), tmp_path / "out", RotationConfig(), recipe="quick", calibration_windows=4))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bits: 4\nforn: online\n", "forn is no option; did you mean form?"),
        ("force: true\n", "force is given on the command line alone"),
        ("trust-remote-code: true\n", "trust-remote-code is given on the command line alone"),
        ("bits: [4]\n", "bits is [4]: a text or a number is expected"),
        ("no-cache: 3\n", "no-cache is 3: true or false is expected"),
        ("keep: [1]\n", "keep is [1]: a list of texts is expected"),
        ("bits: five\n", "Invalid value for '--bits'"),
        ("- bits\n", "holds a list: options are expected"),
        ("bits: 'x\n", "is no YAML"),
        ("\n", "holds no text"),
        ("bits: 4\nbits: 16\n", "bits stands there twice"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused = run("export", tmp_path / "model", tmp_path / "out", "--config", tmp_path / "mine.yaml")
    assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr


def test_settings_of_matrices_are_not_options() -> None:
    request = ExportRequest("m", Path("out"), RotationConfig(overrides={"R2": Override(seed=1)}))
    assert settings_of(request, request.config, windows=None, last_logits=True) is None
    assert settings_of(request, None, windows=None, last_logits=False)["rotations"] == "none"  # type: ignore[index]


@pytest.mark.parametrize("better", ["rotated", "original"])
def test_the_better_of_two_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str) -> None:
    model = folders.model_folder(tmp_path / "model")
    scored, ratios = folder_card.scored_card, iter([1.5, 1.25] if better == "original" else [1.25, 1.5])
    monkeypatch.setattr(folder_onnx, "scored_card", lambda *given, **more: replace(scored(*given, **more), ratio=next(ratios)))  # type: ignore[type-var]
    made = run("export", model, tmp_path / "out", "--recipe", "quick", "--samples", 2, "--compare", "--no-verify")
    assert made.exit_code == 0, made.stderr
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert manifest["card"]["ratio"] == 1.25 and manifest["compared"]["kept"] == better
    assert manifest["compared"]["other"]["ratio"] == 1.5 and (manifest["plan"] is None) == (better == "original")
    left = "rotated" if better == "original" else "the original"
    assert f"{left} by the same scheme: × 1.5000" in " ".join(made.stdout.split())
    assert run("inspect", tmp_path / "out", "--check").exit_code == 0
    other = "rotated" if better == "original" else "not rotated"
    assert f"| the same scheme, {other} | 1.5000" in (tmp_path / "out" / "README.md").read_text()
    told = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (told["rotations"] == "none") == (better == "original")


def test_a_model_writes_what_it_is_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = folders.model_folder(tmp_path / "model"), []
    inputs = result.calibration_inputs
    monkeypatch.setattr(result, "calibration_inputs", lambda program, tokens, text, *more: (texts.append(text.read_text()), inputs(program, tokens, text, *more))[1])
    for name in ("a", "b"):
        made = run("export", model, tmp_path / name, "--recipe", "quick", "--samples", 1, "--calibration", "self", "--no-verify")
        assert made.exit_code == 0, made.stderr
    assert texts[0] == texts[1] and len(set(texts[0].split())) > 5
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["calibration"] == "self"
    assert not list(tmp_path.rglob("calibration.txt"))


def test_own_tokens_are_the_programs() -> None:
    """The first ones after the start are its likeliest; draws come from its probabilities."""
    program = programs.program("llama_tied", "cache", torch.float32)
    rows = own_tokens(program, 3, 9, seed=1)
    assert rows.shape == (3, 9) and torch.equal(rows, own_tokens(program, 3, 9, seed=1))
    scorer = ProgramScorer(program)
    for row in rows:
        assert torch.equal(scorer.logits(row.tolist())[:4].argmax(-1), row[1:5])
    with pytest.raises(ConfigError, match="hands on no cache"):
        own_tokens(programs.program("llama_tied", "plain", torch.float32), 1, 4)


def test_a_dataset_is_calibrated_on_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folders.model_folder(tmp_path / "model")
    monkeypatch.setattr(making, "read_dataset", lambda name: {"some/texts:plain": "what is the weather like " * 400}[name])
    made = run("export", model, tmp_path / "out", "--recipe", "quick", "--samples", 2, "--calibration", "some/texts:plain", "--no-verify")
    assert made.exit_code == 0, made.stderr
    refused = run("export", model, tmp_path / "no", "--calibration", "none.txt")
    assert refused.exit_code == 2 and "no such file" in refused.stderr

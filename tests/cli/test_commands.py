"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spinpass
from spinpass import RotationConfig, cli, errors, record
from spinpass.cli import app as commands
from spinpass.folders import companions as folder_module
from spinpass.folders.export import ExportRequest
from spinpass.formats import staging as files
from spinpass.formats.pt2 import load_program, save_program
from spinpass.runtime.decoder import OrtDecoder
from tests.support import folders, programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 program with a KV cache."""
    path = tmp_path_factory.mktemp("program") / "decode.pt2"
    save_program(programs.program("llama_tied", "cache", torch.float32), path)
    return path


@pytest.fixture(scope="module")
def rotated(pt2: Path) -> Path:
    path = pt2.with_name("rotated.pt2")
    result = run("rotate", pt2, path, "--json")
    assert result.exit_code == 0, result.stderr
    return path


def run(*arguments: object) -> Any:
    """The result of one call; anything but an exit is an error of the test."""
    result = CliRunner().invoke(commands.app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def document(result: Any) -> Any:
    """stdout as the one JSON document that it has to be."""
    return json.loads(result.stdout)


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_writes_a_folder_that_runs(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    data = document(result)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(data["files"])
    assert {"model.onnx", "tokenizer.json", "config.json", "generation_config.json", "spinpass.json"} <= names
    assert "genai_config.json" in names
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert {space["rotation"] for space in manifest["plan"]["spaces"]} == {"R1", "R2", "R3", "R4"}
    assert manifest["record"]["certificate"]["ok"] and manifest["onnx"]["certificate"]["ok"]
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["packed"] is None
    assert manifest["genai"] == {"file": "genai_config.json", "reason": None}
    assert "present.0.key" in manifest["onnx"]["outputs"]
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4
    assert "load" in result.stderr and "certify" in result.stderr


def test_export_of_the_original_in_4_bits(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path, "--rotations", "none", "--int4", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "0 online Hadamards; not certified: switched off" in result.stdout
    manifest = json.loads((tmp_path / "spinpass.json").read_text())
    assert manifest["plan"] is None and manifest["record"] is None
    assert manifest["packed"]["matmuls"] > 0
    assert len(OrtDecoder(tmp_path).generate([5, 6, 7], 4, end=()).tokens) == 4


@pytest.mark.parametrize(
    "scheme",
    ["w8-rtn-a8", "w4g16-gptq-a8static-kv8-head8-embed8", "w4g16-rtn-a8-distill2-head8", "w3.5g16-rtn-rows-a8"],
)
def test_export_of_a_quantized_model(folder: Path, tmp_path: Path, scheme: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 200)
    given = ["--quantize", scheme, "--calibration", text, "--samples", 2, "--no-verify"]
    result = run("export", folder, tmp_path / "out", *given)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert manifest["packed"]["bytes_after"] < manifest["packed"]["bytes_before"]
    assert len(manifest["quantization"]["weights"]) >= 14 and manifest["quantization"]["activations"]
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def test_export_says_what_to_know_of_a_combination() -> None:
    def notes(**options: Any) -> str:
        return " ".join(ExportRequest("model", Path("out"), **options).notes)

    rotated, online = RotationConfig(), RotationConfig(form="online")
    assert "seldom gain from a rotation" in notes(config=rotated, int4=True) and not notes(config=None, int4=True)
    assert "slower than with -a8" in notes(config=online, quantize="w4g128-rtn")
    assert "--form online" in notes(config=rotated, quantize="w4-rtn-a8")
    assert not notes(config=online, quantize="w4-rtn-a8") and not notes(config=rotated)


def test_export_needs_a_text_for_gptq(folder: Path, pt2: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path / "out", "--quantize", "w4")
    assert result.exit_code == 2 and "w4 needs a text to calibrate on" in result.stderr
    result = run("export", folder, tmp_path / "out", "--quantize", "w4-rtn", "--int4")
    assert result.exit_code == 2 and "--int4 rounds the weights by itself" in result.stderr
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 300)
    result = run("export", pt2, tmp_path / "out", "--quantize", "w4", "--calibration", text)
    assert result.exit_code == 2 and "has no tokenizer to read" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tune_measures_decides_and_writes(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 200)
    sizes = ["--samples", 1, "--windows", 2, "--length", 16, "--block-sizes", "4"]
    asked = ["tune", folder, "--quantize", "w4-rtn-a4", "--calibration", text, *sizes]
    found = document(run(*asked, "--json"))
    assert {t["name"].removesuffix(", where it helps") for t in found["trials"]} == {
        "none", "offline", "online", "online, across heads", "online, blocks of 4"
    }  # fmt: skip
    assert found["trials"][0]["name"] == "none" and found["chosen"] in {t["name"] for t in found["trials"]}
    result = run(*asked, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "Tuning for w4-rtn-a4" in result.stdout and "perplexity ×" in result.stdout
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert len(manifest["quantization"]["weights"]) >= 14 and manifest["packed"]["matmuls"] > 0
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def test_tune_says_what_is_wrong(folder: Path, pt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 300)
    given = ["--quantize", "a4", "--calibration", text]
    result = run("tune", folder, *given, "--block-sizes", "4,x")
    assert result.exit_code == 2 and "--block-sizes '4,x' is not a list of numbers" in result.stderr
    result = run("tune", pt2, *given)
    assert result.exit_code == 2 and "has no tokenizer to read" in result.stderr
    result = run("tune", folder, "--quantize", "a5", "--calibration", text)
    assert result.exit_code == 2 and "activations of 5 bits" in result.stderr


def test_export_of_a_program_has_no_tokenizer(pt2: Path, tmp_path: Path) -> None:
    result = run("export", pt2, tmp_path / "out", "--rotations", "R2,R4", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "spinpass.json"}
    assert "R4:model.layers.*.mlp.down_proj (2×)" in result.stdout and "R1" not in result.stdout


# -- rotate, plan, verify ---------------------------------------------------------------------------------------------


def test_rotate_and_verify(pt2: Path, rotated: Path) -> None:
    found = record.read(load_program(rotated))
    assert found is not None and found.certificate is not None and found.certificate["ok"]
    result = run("verify", pt2, rotated)
    assert result.exit_code == 0, result.stderr
    assert "equivalent: relative error" in result.stdout and "logits" in result.stdout
    assert document(run("verify", pt2, rotated, "--json"))["ok"] is True


def test_rotate_prints_plan_certificate_and_file(pt2: Path, tmp_path: Path) -> None:
    result = run("rotate", pt2, tmp_path / "x.pt2", "--rotations", "R4", "--kind", "random-hadamard", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    for expected in ("random-hadamard(80, seed 3)", "Certificate", "equivalent", "x.pt2"):
        assert expected in result.stdout


def test_options_reach_the_configuration(pt2: Path) -> None:
    options = ("--rotations", "R4,R1", "--block-size", "16", "--form", "online", "--tied", "keep", "--cache", "plain")
    data = document(run("plan", pt2, *options, "--exclude", "*layers.0*", "--exclude", "R9*", "--json"))["plan"]
    config = data["config"]
    assert config["rotations"] == ["R1", "R4"] and config["exclude"] == ["*layers.0*", "R9*"]
    assert (config["block_size"], config["form"], config["tied"], config["cache"]) == (16, "online", "keep", "plain")
    assert {space["form"] for space in data["spaces"]} == {"online"}
    assert all("layers.0" not in space["name"] for space in data["spaces"])


def test_plan_groups_layers_unless_verbose(pt2: Path) -> None:
    short = run("plan", pt2)
    assert short.exit_code == 0 and "R2:model.layers.*.self_attn (2×)" in short.stdout
    long = run("plan", pt2, "-v")
    assert "R2:model.layers.1.self_attn" in long.stdout and "(2×)" not in long.stdout
    assert "FoldRotations" in long.stderr and "FoldRotations" not in short.stderr
    assert "FoldRotations" not in run("plan", pt2).stderr  # the log does not outlive its command


def test_plan_of_a_folder_and_refusals(folder: Path) -> None:
    result = run("plan", folder, "--no-cache", "--exclude", "R4:*")
    assert result.exit_code == 0, result.stderr
    assert "Refused" in result.stdout and "excluded by 'R4:*'" in result.stdout


def test_verify_finds_a_difference(pt2: Path, tmp_path: Path) -> None:
    other = load_program(pt2)
    with torch.no_grad():
        other.state_dict["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_program(other, tmp_path / "other.pt2")
    result = run("verify", pt2, tmp_path / "other.pt2")
    assert result.exit_code == 1
    assert "NOT equivalent" in result.stdout and "FAIL" in result.stdout


def test_verify_an_onnx_file_and_its_folder(pt2: Path, rotated: Path, tmp_path: Path) -> None:
    from spinpass.exporters.onnx import writer as onnx

    onnx.export(load_program(rotated), tmp_path / "out")
    for reference, target in ((rotated, tmp_path / "out"), (pt2, tmp_path / "out" / "model.onnx")):
        result = run("verify", reference, target)
        assert result.exit_code == 0, result.stderr
        assert "equivalent: at worst" in result.stdout
    assert document(run("verify", pt2, tmp_path / "out", "--json"))["ok"] is True


# -- exit codes and messages ------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A program in which nothing can be rotated."""
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Sigmoid(), torch.nn.Softmax(-1)).eval()
    save_program(torch.export.export(module, (torch.randn(2, 16),)), tmp_path / "classifier.pt2")
    return tmp_path / "classifier.pt2"


def test_refused(classifier: Path, tmp_path: Path) -> None:
    for command in (("rotate", classifier, tmp_path / "x.pt2"), ("export", classifier, tmp_path / "out")):
        result = run(*command)
        assert result.exit_code == 1
        assert "spinpass: nothing was rotated: R1: the program has no residual stream" in result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.pt2"}
    result = run("plan", classifier)
    assert result.exit_code == 1 and "left alone" in result.stdout


def test_refused_in_json(classifier: Path, tmp_path: Path) -> None:
    data = document(run("rotate", classifier, tmp_path / "x.pt2", "--json"))
    assert (data["ok"], data["error"]) == (False, "RefusedError") and "nothing was rotated" in data["message"]
    assert document(run("plan", classifier, "--json"))["ok"] is False


def test_training_mode_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    save_program(torch.export.export(module, (torch.randn(2, 8),)), tmp_path / "x.pt2")
    result = run("plan", tmp_path / "x.pt2")
    assert result.exit_code == 1 and "dropout is active" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan", "missing.pt2"), "there is no file or folder missing.pt2"),
        (("rotate", "missing.pt2", "{tmp}/x.pt2"), "there is no file missing.pt2"),
        (("verify", "{pt2}", "missing.onnx"), "there is no file missing.onnx"),
        (("verify", "{pt2}", "{notes}"), "is neither a .pt2 nor an .onnx file"),
        (("rotate", "{pt2}", "{tmp}/x.onnx"), "x.onnx does not end in .pt2"),
        (("plan", "{notes}"), "is neither a .pt2 nor a .gguf file"),
        (("plan", "{pt2}", "--rotations", "R1,R7"), "unknown rotation 'R7'; choose from R1, R2, R3, R4"),
        (("plan", "{pt2}", "--rotations", "none"), "a plan needs a rotation; choose from R1,R2,R3,R4"),
        (("rotate", "{pt2}", "{tmp}/x.pt2", "--rotations", "none"), "rotate needs a rotation"),
        (("plan", "{pt2}", "--block-size", "7"), "7"),
        (("plan", "{pt2}", "--block-size", "0"), "block_size=0 is not a positive integer"),
        (("plan", "{pt2}", "--kind", "fourier"), "fourier"),
        (("plan", "{pt2}", "--dtype", "int3"), "int3"),
        (("plan",), "MODEL"),
        (("rotate", "{pt2}", "{notes}/x.pt2"), "a part of the path is a file"),
        (("export", "{pt2}", "{notes}"), "a part of the path is a file"),
        (("plan", "no-such-model-anywhere"), "transformers cannot load no-such-model-anywhere"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], reason: str, pt2: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    places = {"pt2": pt2, "tmp": tmp_path, "notes": notes}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2
    assert reason in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_folder_that_cannot_be_written_is_found_before_the_work(pt2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    for arguments in (("export", pt2, tmp_path / "out"), ("rotate", pt2, tmp_path / "new" / "x.pt2")):
        result = run(*arguments)
        assert result.exit_code == 2 and "the folder is not writable" in result.stderr
        assert "load" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_full_disk(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    for arguments in (("export", pt2, tmp_path / "out"), ("rotate", pt2, tmp_path / "x.pt2")):
        result = run(*arguments, "--no-verify")
        assert result.exit_code == 2 and "the disk is full" in result.stderr
    assert not list(tmp_path.iterdir())


def test_failed_certificate(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.VerificationError("the programs are not equivalent: logits")

    monkeypatch.setattr(folder_module, "transform", fail)
    result = run("rotate", pt2, tmp_path / "x.pt2")
    assert result.exit_code == 1 and "not equivalent: logits" in result.stderr


def test_unexpected_errors_are_one_line_unless_asked(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(commands, "make_plan", fail)
    result = run("plan", pt2)
    assert result.exit_code == 1
    assert "spinpass: unexpected ZeroDivisionError: division by zero; -vv shows where" in result.stderr
    assert isinstance(CliRunner().invoke(commands.app, ["plan", str(pt2), "-vv"]).exception, ZeroDivisionError)


def test_without_the_onnx_packages(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx_names", "onnx_quantize", "onnx_compare"):
        monkeypatch.setitem(sys.modules, f"spinpass.exporters.{name}", None)
        monkeypatch.delattr(f"spinpass.exporters.{name}", raising=False)
    (tmp_path / "x.onnx").touch()
    for arguments in (("export", pt2, tmp_path / "out"), ("verify", pt2, tmp_path / "x.onnx")):
        result = run(*arguments)
        assert result.exit_code == 2 and "pip install 'spinpass[onnx]'" in result.stderr


# -- the entry --------------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    result = run("--version")
    assert result.exit_code == 0 and f"torch {torch.__version__}" in result.stdout
    for command in ("export", "rotate", "plan", "verify", "eval", "report"):
        result = run(command, "--help")
        assert result.exit_code == 0 and "--json" in result.stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_packages_of_the_command_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "commands":  # from .commands import app
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"spinpass: the command line needs {package}: pip install 'spinpass[cli]'\n"


def test_a_real_process(pt2: Path, rotated: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "spinpass", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = call("plan", pt2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["spaces"]
    done = call("rotate", pt2, "x.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "spinpass: x.onnx does not end in .pt2, the name of an exported program\n"


def test_the_commands_do_what_the_functions_do(pt2: Path, rotated: Path) -> None:
    expected = spinpass.transform(load_program(pt2)).state_dict
    for name, tensor in load_program(rotated).state_dict.items():
        assert torch.equal(tensor, expected[name])


# -- eval -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(folders.WORDS[i * i % len(folders.WORDS)] for i in range(400)))
    return path


def test_eval_scores_a_model(folder: Path, text: Path) -> None:
    result = run("eval", folder, "--text", text, "--windows", 4, "--length", 32, "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["tokens"] == 4 * 31 and found["perplexity"] > 1 and len(found["losses"]) == 4


def test_eval_compares_a_rotated_and_quantized_model_with_what_it_was(folder: Path, text: Path) -> None:
    common = ("eval", folder, "--text", text, "--windows", 3, "--length", 32, "--json")
    rotated = document(run(*common, "--rotate", "online"))
    assert rotated["ratio"] == pytest.approx(1, abs=1e-5) and rotated["agreement"] == 1.0 and rotated["kl"] < 1e-8
    quantized = document(run(*common, "--quantize", "w2-a4", "--calibration", text))
    assert quantized["kl"] > 1e-4 and quantized["ratio"] != 1.0
    shown = run(*common[:-1], "--quantize", "w8-rtn")
    assert shown.exit_code == 0 and "KL, nats" in shown.stdout


def test_eval_scores_what_onnx_runtime_runs(folder: Path, text: Path, tmp_path: Path) -> None:
    assert run("export", folder, tmp_path / "out").exit_code == 0
    result = run(
        "eval", tmp_path / "out", "--against", folder, "--text", text, "--windows", 2, "--length", 16, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert document(result)["ratio"] == pytest.approx(1, abs=1e-4)


def test_eval_scores_a_program_and_the_file_made_of_it_side_by_side(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    assert run("export", folder, out, "--quantize", "w4-rtn").exit_code == 0
    common = ("eval", folder, "--text", text, "--windows", 2, "--length", 16, "--file", out)
    both = document(run(*common, "--quantize", "w4-rtn", "--rotate", "auto", "--json"))
    assert both["kl"] > 1e-6 and both["files"][str(out)]["kl"] == pytest.approx(both["kl"], rel=1e-2)
    alone = document(run(*common, "--json"))
    assert alone["perplexity"] == both["before"]["perplexity"] and alone["files"] == both["files"]
    shown = run(*common)
    assert shown.exit_code == 0 and "÷ before" in shown.stdout and " out " in shown.stdout


def test_eval_reads_datasets_by_name(folder: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.csv").write_text("text\n" + "\n".join(text.read_text().split(" ")))
    common = ("eval", folder, "--windows", 2, "--length", 16, "--json")
    assert document(run(*common, "--dataset", data))["tokens"] == 2 * 15
    (data / "test.csv").write_text("a,b\nx,y\n")  # a stream of it knows no types before its first row
    for name, why in {f"{data}": "has no column 'text'", f"{data}::nosuch": "cannot be read"}.items():
        result = run(*common, "--dataset", name)
        assert result.exit_code == 2 and why in result.stderr, result.stderr


def test_eval_without_the_package_for_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("eval", folder, "--dataset", "wikitext")
    assert result.exit_code == 2 and "pip install datasets" in result.stderr


def test_eval_says_what_is_missing(folder: Path, pt2: Path, text: Path, tmp_path: Path) -> None:
    wrong = {
        "--calibration FILE": (folder, "--quantize", "w4"),
        "leave out": (folder, "--against", folder, "--rotate", "auto"),
        "leave out --against": (folder, "--against", folder, "--file", folder),
        "leave out one of them": (folder, "--text", text, "--dataset", "wikitext"),
        "not a readable": (folder, "--text", tmp_path / "none.txt"),
        "--tokenizer": (pt2,),
        "the text has": (folder, "--text", text, "--windows", 999),
        "is not a part of a scheme": (folder, "--quantize", "w4-nf4"),
        "0 samples to calibrate on": (folder, "--quantize", "w4", "--calibration", text, "--samples", 0),
    }
    for why, arguments in wrong.items():
        result = run("eval", *arguments)
        assert result.exit_code == 2 and why in result.stderr, (why, result.stderr)

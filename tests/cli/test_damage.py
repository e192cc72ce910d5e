"""Damage and bombs at the command line: exit code 1, one sentence, nothing run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import folders
from tests.support.commands import document, run
from tests.support.damage import Bomb, copied, flips, members, saved, zipped


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "out"
    result = run("export", folder, target, "--bits", 16, "--rotations", "none", "--no-verify")
    assert result.exit_code == 0, result.stderr
    return target


def refused(*arguments: object, mark: Path | None = None, kind: str = "DamageError") -> str:
    """What the command says of the first of its arguments' files, as the one thing it says."""
    result = run(*arguments, "--json")
    assert result.exit_code == 1, (arguments, result.output)
    said = document(result)
    assert said["error"] == kind and "\n" not in said["message"] and "Traceback" not in result.stderr
    assert mark is None or not mark.exists()
    return str(said["message"])


COMMANDS = {
    "plan": (), "export": ("OUT", "--bits", 16), "eval": ("--tokenizer", "FOLDER"), "report": ("--tokenizer", "FOLDER"),
    "rotate": ("OUT.pt2",), "verify": ("SELF",), "inspect": (),
    "tune": ("--quantize", "w4-rtn", "--calibration", "TEXT"),
}  # fmt: skip


def call(command: str, model: Path, folder: Path, tmp_path: Path) -> list[object]:
    """The command with what it looks at before a model in order, so that it comes to the model."""
    (tmp_path / "text.txt").write_text(" ".join(folders.WORDS * 4000))
    given = {
        "OUT": tmp_path / "o", "OUT.pt2": tmp_path / "o.pt2", "SELF": model, "FOLDER": folder,
        "TEXT": tmp_path / "text.txt",
    }  # fmt: skip
    return [command, model, *(given.get(part, part) for part in COMMANDS[command])]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bomb_in_a_program(command: str, pt2: Path, folder: Path, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "x.pt2"
    found = members(pt2.read_bytes())
    name = next(name for name in found if name.endswith("sample_inputs/model.pt"))
    path.write_bytes(zipped(found | {name: saved(Bomb(mark))}))
    if command == "tune":  # it reads its text with the model's own tokenizer, and a program has none: it is not opened
        result = run(*call(command, path, folder, tmp_path))
        assert result.exit_code == 2 and "has no tokenizer" in result.stderr and not mark.exists()
        return
    assert "sample_inputs/model.pt" in refused(*call(command, path, folder, tmp_path), mark=mark)


@pytest.mark.parametrize("command", ["plan", "export", "eval", "report", "tune"])
def test_a_bomb_in_a_model_folder(command: str, folder: Path, tmp_path: Path) -> None:
    mark, model = tmp_path / "ran", copied(folder, tmp_path / "m")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(saved({"a": Bomb(mark)}))
    assert "pytorch_model.bin" in refused(*call(command, model, folder, tmp_path), mark=mark)
    assert not (tmp_path / "o").exists()


def test_a_flip_in_each_file_of_an_exported_folder(out: Path, tmp_path: Path) -> None:
    """generate opens the model, its weights, the tokenizer and the configuration; inspect --check reads all."""
    assert run("generate", out, "what is", "--max-new-tokens", 1).exit_code == 0
    target = copied(out, tmp_path / "out")
    listed = json.loads((out / "spinpass.json").read_text())["files"]
    assert {"model.onnx", "config.json", "tokenizer.json"} <= listed.keys()
    for name in [*listed, "spinpass.json"]:
        whole = (target / name).read_bytes()
        stop = whole.rindex(b"}") if name == "spinpass.json" else None
        for _, damaged in flips(whole, 3, stop=stop, seed=1):
            (target / name).write_bytes(damaged)
            kind = "DamageError" if name == "spinpass.json" else "VerificationError"
            assert name in refused("inspect", target, "--check", kind=kind)
            if name not in ("genai_config.json", "README.md"):
                assert name in refused("generate", target, "what is", "--max-new-tokens", 1, kind=kind)
                assert name in refused("eval", target, kind=kind)
        (target / name).write_bytes(whole)
    assert run("inspect", target, "--check").exit_code == 0


def test_an_export_says_what_it_was_made_of(out: Path, folder: Path, tmp_path: Path) -> None:
    made_of = json.loads((out / "spinpass.json").read_text())["source"]["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= made_of.keys()
    assert made_of["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    shown = run("inspect", out, "--with", out)
    assert "made of model.safetensors" in shown.stdout and "made of the same files" in shown.stdout
    with_other = copied(out, tmp_path / "other")
    from spinpass.formats import sealed

    about = json.loads((with_other / "spinpass.json").read_text())
    about["source"]["files"]["config.json"]["sha256"] = "0" * 64
    (with_other / "spinpass.json").write_text(json.dumps(sealed(about)))
    assert "made of other files: config.json" in run("inspect", out, "--with", with_other).stdout


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}", "{% if %}"],
    ids=["escape", "endless", "error", "syntax"],
)  # fmt: skip
def test_a_bomb_in_a_chat_template(template: str, out: Path, tmp_path: Path) -> None:
    from spinpass.formats import hashes, sealed

    target = copied(out, tmp_path / "out")
    (target / "chat_template.jinja").write_text(template)
    about = json.loads((target / "spinpass.json").read_text())
    about["files"] |= hashes(target, ["chat_template.jinja"])
    (target / "spinpass.json").write_text(json.dumps(sealed(about)))
    result = run("generate", target, "what is", "--json")
    said = document(result)
    assert result.exit_code == 1 and "the chat template of" in said["message"] and "\n" not in said["message"]


@pytest.mark.parametrize("where", ["../secret.bin", "ABSOLUTE", "link.bin", "short.bin"])
def test_an_onnx_file_whose_weights_lie_elsewhere(where: str, out: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    folder = copied(out, tmp_path / "in")  # with a tokenizer, which is looked for before the model
    for name in ("spinpass.json", "genai_config.json"):
        (folder / name).unlink()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "short.bin").write_bytes(bytes(8))
    weight = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", where.replace("ABSOLUTE", str(tmp_path / "secret.bin"))), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert onnx.load(folder / "model.onnx", load_external_data=False)
    assert "cannot load model.onnx" in refused("generate", folder, "what is", "--max-new-tokens", 1)
    (folder / "model.onnx").write_bytes(b"\x08\xff" * 40)
    assert "cannot load model.onnx" in refused("generate", folder, "what is", "--max-new-tokens", 1)

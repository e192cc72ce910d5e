"""A folder holds what a hub expects: a model card, the licence, what the tokenizer saves, the search defaults."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from spinpass import Override, RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import export
from spinpass.folders.command import command_of
from spinpass.folders.model_card import hub_name
from spinpass.loading import Source
from tests.support import folders
from tests.support.commands import run

CARD = "---\nlicense: apache-2.0\nbase_model: some/other\n---\n# Theirs\n"
SEARCH = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2, "pad_token_id": 0}  # without do_sample


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders.model_folder(tmp_path_factory.mktemp("private") / "tiny", "llama")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Do what you like.")
    (folder / "NOTICE.txt").write_text("Made by somebody.")
    (folder / "LICENSE.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps(SEARCH))
    return folder


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "out"
    export(source, folder, bits=4, recipe="plain")
    return folder


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_front_matter_is_what_a_hub_reads(out: Path) -> None:
    assert front_matter(out) == {
        "license": "apache-2.0",
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["spinpass", "onnx", "quantized"],
    }


def test_the_card_says_what_spinpass_json_says_and_no_place(source: Path, out: Path) -> None:
    text = (out / "README.md").read_text(encoding="utf-8")
    about = json.loads((out / "spinpass.json").read_text())
    card = about["card"]
    for value in (
        f"{card['ratio']:.4f} ±",
        f"{card['kl']:.4f} nats",
        f"{card['agreement']:.1%}",
        f"| {card['bits_per_weight']:.2f} |",
    ):
        assert value in text
    assert (
        "Weights of linear layers: 14 of 4 bits in groups of 32; 2 of 8 bits" in text
        and "# tiny for ONNX Runtime" in text
    )
    assert "not certified: it rounds activations" in text and "cases are as the program has them" in text
    command = "$ spinpass export MODEL OUT --rotations none --quantize w4g32-rtn-a8-head8"
    assert command in text and "--last-logits\n" in text and "in onnxruntime." in text
    assert "That of the model: apache-2.0." in text and "`LICENSE`, `NOTICE.txt`" in text
    assert str(source.parent) not in text and str(out.parent) not in text and "private" not in text


def test_what_the_card_tells_to_run_runs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(out)
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code) == 1 and 'onnxruntime_genai.Model(".")' in text
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code[0], "README.md", "exec"), {})
    assert said.getvalue().strip()
    lines = iter(["what is it", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    commands = re.findall(r"^\$ spinpass (?!export)(.*)$", text, re.M)
    assert commands == ["chat ."] and run(*commands[0].split(), "--max-new-tokens", 5).exit_code == 0
    assert run("inspect", ".", "--check").exit_code == 0


def test_what_belongs_to_the_model_lies_beside_it(source: Path, out: Path) -> None:
    listed = json.loads((out / "spinpass.json").read_text())["files"]
    for name in (
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert name in listed and (out / name).is_file()
    for name in ("LICENSE", "NOTICE.txt"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert "LICENSE.json" not in listed
    kept = json.loads((out / "generation_config.json").read_text())
    assert {name: kept[name] for name in SEARCH} == SEARCH, "as they came, though transformers does not save them so"


def test_an_edited_card_is_its_editors(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out, None, bits=16)
    ours = (out / "README.md").read_text()
    export(source, out, None, bits=16)  # what nobody has edited is replaced
    assert (out / "README.md").read_text().split("## Measured")[0] == ours.split("## Measured")[0]
    (out / "README.md").write_text("Mine.")
    (out / "extra.md").write_text("Mine, too.")
    assert run("inspect", out).exit_code == 0 and run("generate", out, "what is", "--max-new-tokens", 3).exit_code == 0
    checked = run("inspect", out, "--check")
    assert checked.exit_code == 1 and "README.md is not the file that spinpass.json lists" in checked.stderr
    with pytest.raises(ConfigError, match="README.md and 1 more, which no export of spinpass has put there as it is"):
        export(source, out, None, bits=16)
    export(source, out, None, bits=16, force=True)
    assert (out / "README.md").read_text() == "Mine." and (out / "extra.md").read_text() == "Mine, too."
    assert "README.md" not in json.loads((out / "spinpass.json").read_text())["files"]
    assert run("inspect", out, "--check").exit_code == 0


def test_a_card_that_was_there_before_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine.")
    with pytest.raises(ConfigError, match="holds README.md, which no export"):
        export(source, tmp_path, None, bits=16)
    export(source, tmp_path, None, bits=16, force=True)
    assert (tmp_path / "README.md").read_text() == "Mine." and (tmp_path / "LICENSE").is_file()


def test_a_rotated_folder_without_a_score(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", RotationConfig(form="online", exclude=("R4:*.0.*",)), bits=16)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "rotated (R1, R2, R3, R4)" in text and "## Measured" not in text
    assert "- the rotation: equivalent" in text and "- the file: equivalent" in text
    assert " --form online --exclude 'R4:*.0.*' --bits 16\n" in text
    assert front_matter(tmp_path / "out")["tags"] == ["spinpass", "onnx", "rotated"]


def test_the_command_is_what_the_settings_say_without_places() -> None:
    settings = {"rotations": "R1,R2", "quantize": "w4", "keep": ["a b", "*.x"], "int4": True, "samples": 3}
    assert command_of(settings, "") == (
        "spinpass export MODEL OUT --rotations R1,R2 --quantize w4 --keep 'a b' --keep '*.x' --int4 --samples 3"
    )
    assert (
        command_of({"calibration": "/home/me/text.txt"}, "org/name")
        == "spinpass export org/name OUT --calibration TEXT"
    )
    assert command_of({"calibration": "self"}, "").endswith("--calibration self")
    assert command_of({"calibration": "wikitext:wikitext-2-raw-v1:test"}, "").endswith("wikitext-2-raw-v1:test")


def test_the_command_asks_for_the_same_folder(source: Path, out: Path, tmp_path: Path) -> None:
    found = re.findall(r"^\$ spinpass export MODEL OUT (.*)$", (out / "README.md").read_text(encoding="utf-8"), re.M)
    again = run("export", source, tmp_path / "again", *shlex.split(found[0]))
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def test_what_options_cannot_say_is_no_command(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", RotationConfig(overrides={"R4": Override(block_size=16)}), bits=16)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Made by" not in text and "## Run it" in text


def test_a_path_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_name(Source("transformers", "org/name")) == "org/name"
    assert hub_name(Source("transformers", str(tmp_path))) == "" == hub_name(Source("gguf", "org", "a.gguf"))
    monkeypatch.chdir(tmp_path)
    assert hub_name(Source("transformers", "org/name")) == ""

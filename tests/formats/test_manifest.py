"""What an exported folder says of itself, and that parts which do not belong together are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

import spinpass
from spinpass import RotationConfig
from spinpass.cli.app import app
from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.exporters.onnx import writer as exporter
from spinpass.formats.manifest import METADATA, check_made_of, hashes, read_artefact, sealed
from spinpass.formats.pt2 import save_program
from spinpass.runtime.ort_model import OrtModel
from tests.support import folders

RUN = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def seeded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("seeded"), "--kind", "random-hadamard", "--seed", "7")


def exported(model: Path, folder: Path, *options: str) -> Path:
    result = RUN.invoke(app, ["export", str(model), str(folder), "--bits", "16", *options])
    assert result.exit_code == 0, result.stderr
    return folder


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def changed_metadata(folder: Path, change: Any) -> None:
    """The record inside model.onnx, edited; its size and hash in the manifest follows, so that the record alone is wrong."""
    file = onnx.load(folder / "model.onnx", load_external_data=False)
    entry = next(e for e in file.metadata_props if e.key == METADATA)
    data = json.loads(entry.value)
    change(data)
    entry.value = json.dumps(data)
    (folder / "model.onnx").write_bytes(file.SerializeToString())
    about = json.loads((folder / "spinpass.json").read_text())
    about["files"] |= hashes(folder, ["model.onnx"])
    (folder / "spinpass.json").write_text(json.dumps(sealed(about)))


def test_a_folder_knows_its_rotations_the_basis_of_its_cache_and_its_files(out: Path) -> None:
    found = read_artefact(out)
    found.check(files=True)
    assert found.rotations and set(found.rotations) == set(found.manifest["record"]["rotations"])
    names = {name.split(".")[0] for name in found.bases}
    assert len(found.bases) == 2 * 2 * 2 and len(names) == 2, "keys and values of two layers, in and out"
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(found.manifest["files"])
    assert found.manifest["plan"] and found.manifest["record"]["certificate"]["ok"] and found.manifest["versions"]


def test_inspect_shows_it(out: Path) -> None:
    shown = RUN.invoke(app, ["inspect", str(out), "--check"])
    assert shown.exit_code == 0, shown.stderr
    for part in ("Rotations", "Cache", "rotation certified", "file certified", "model.onnx", "hadamard("):
        assert part in shown.stdout, part
    data = json.loads(RUN.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert data["ok"] and data["rotations"] and data["bases"] and data["onnx"]["certificate"]


def test_artefacts_share_a_cache_only_in_the_same_basis(out: Path, seeded: Path, model: Path, tmp_path: Path) -> None:
    plain = exported(model, tmp_path / "plain", "--rotations", "none")
    assert RUN.invoke(app, ["inspect", str(out), "--with", str(out)]).exit_code == 0
    for other in (seeded, plain):
        result = RUN.invoke(app, ["inspect", str(out), "--with", str(other)])
        assert result.exit_code == 1 and "cannot share a cache" in result.stderr
    with pytest.raises(VerificationError, match="in the original basis in the first and rotated by hadamard"):
        read_artefact(plain).require_same_basis(read_artefact(out))


def test_a_model_file_of_another_export_is_refused(out: Path, seeded: Path, tmp_path: Path) -> None:
    mixed = copied(out, tmp_path / "mixed")
    for name in ("model.onnx", "spinpass.json"):
        (mixed / name).write_bytes((seeded if name == "model.onnx" else out).joinpath(name).read_bytes())
    with pytest.raises(VerificationError, match="disagree about the rotation of .*: they come from different exports"):
        read_artefact(mixed).check()
    assert RUN.invoke(app, ["inspect", str(mixed)]).exit_code == 1
    with pytest.raises(VerificationError, match="come from different exports"):
        OrtModel.from_pretrained(mixed)


def test_a_changed_basis_is_refused(out: Path, tmp_path: Path) -> None:
    folder = copied(out, tmp_path / "changed")

    def change(data: dict[str, Any]) -> None:
        first = next(iter(data["inputs"].values()))
        first["rotation"] |= {"kind": "random-hadamard", "seed": 3}

    changed_metadata(folder, change)
    with pytest.raises(VerificationError, match="in another basis"):
        read_artefact(folder).check()


def test_changed_and_missing_files_are_noticed(out: Path, tmp_path: Path) -> None:
    folder = copied(out, tmp_path / "files")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("1", "2"))  # of the same size
    read_artefact(folder).check()
    with pytest.raises(VerificationError, match=r"config\.json is not the file that spinpass\.json lists"):
        read_artefact(folder).check(files=True)
    config.write_text(text + " ")
    with pytest.raises(VerificationError, match="is not the file"):
        read_artefact(folder).check()
    config.unlink()
    with pytest.raises(VerificationError, match=r"lacks config\.json"):
        read_artefact(folder).check()


def test_files_that_cannot_be_read_say_why(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        read_artefact(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match="is no ONNX model"):
        read_artefact(tmp_path)
    folder = copied(out, tmp_path / "broken")
    changed_metadata(folder, lambda data: data.pop("inputs"))
    with pytest.raises(ExportError, match="record of rotations that cannot be read"):
        read_artefact(folder)
    copied(out, tmp_path / "no protobuf").joinpath("model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(VerificationError, match=r"model\.onnx is not the file that spinpass\.json lists"):
        read_artefact(tmp_path / "no protobuf")
    for content, why in (("[]", "is not what spinpass writes"), ("{", "cannot be read")):
        (folder / "model.onnx").write_bytes((out / "model.onnx").read_bytes())
        (folder / "spinpass.json").write_text(content)
        with pytest.raises(ExportError, match=why):
            read_artefact(folder)


def test_programs_and_lone_files_are_artefacts_too(tmp_path: Path) -> None:
    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    program = torch.export.export(Layer(8, 8).eval(), (torch.zeros(1, 8),))
    save_program(program, tmp_path / "plain.pt2")
    found = read_artefact(tmp_path / "plain.pt2")
    found.check()
    assert not found.rotations and not found.bases and not found.manifest
    exporter.export(program, tmp_path / "lone.onnx")
    shown = RUN.invoke(app, ["inspect", str(tmp_path / "lone.onnx")])
    assert shown.exit_code == 0 and "none that it knows of" in shown.stdout and "stands alone" in shown.stdout


def test_a_rotated_program_carries_its_bases(tmp_path: Path) -> None:
    from tests.support.decoders import Decoder, exported, made

    rotated = spinpass.transform(exported(made(Decoder(layers=1))), RotationConfig())
    save_program(rotated, tmp_path / "rotated.pt2")
    assert set(read_artefact(tmp_path / "rotated.pt2").rotations) == set(spinpass.record.read(rotated).rotations)


def test_a_folder_is_compared_with_the_model_it_is_made_of(out: Path, model: Path, tmp_path: Path) -> None:
    check_made_of(out, model)
    other = folders.model_folder(tmp_path, hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ConfigError, match=r"was made of another config.json than that of .*: name its own model"):
        check_made_of(out, other)
    with pytest.raises(ConfigError, match="was made of another config.json"):
        check_made_of(out / "model.onnx", other)
    result = RUN.invoke(app, ["eval", str(other), "--file", str(out)])
    assert result.exit_code == 2 and "was made of another" in result.stderr

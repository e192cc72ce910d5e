"""From a folder, a name, a GGUF file or a .pt2 file to a program; and back to a file, whole or not at all."""

from __future__ import annotations

import errno
import importlib
import io
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ConfigError, ExportError, ProgramError
from spinpass.formats import pt2
from spinpass.formats import staging as files
from spinpass.loading import models as loading
from spinpass.loading.models import Source, load_model, load_program, locate, save_program
from tests.support import folders, models, programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.gguf_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def linear() -> ExportedProgram:
    return torch.export.export(torch.nn.Linear(64, 64), (torch.randn(2, 64),))


# -- what a name means ------------------------------------------------------------------------------------------------


def test_locate_finds_every_kind(folder: Path, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").touch()
    assert locate(folder) == Source("transformers", str(folder))
    assert locate(gguf) == locate(gguf.parent) == Source("gguf", str(gguf.parent), "tiny.gguf")
    assert locate(tmp_path / "x.pt2") == Source("program", str(tmp_path / "x.pt2"))
    for name in ("gpt2", "org/model-1.5"):
        assert locate(name) == Source("transformers", name)


@pytest.mark.parametrize("name", ["missing.pt2", "missing.gguf", "./missing", "/missing", "a/b/c", "../x", "a b"])
def test_locate_misses_files(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no file or folder"):
        locate(name)


def test_locate_turns_down_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"notes\.txt is neither a \.pt2 nor a \.gguf file"):
        locate(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="holds no model: neither config.json with weights nor a GGUF file"):
        locate(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"several GGUF files; name one of a\.gguf, b\.gguf"):
        locate(tmp_path)


# -- models -----------------------------------------------------------------------------------------------------------


def test_folder_becomes_one_program_with_a_cache(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []
    loaded = load_model(folder, progress=steps.append)
    assert steps == ["load", "export"]
    assert capfd.readouterr().err == ""  # no bars, no warnings
    inputs = loaded.program.graph_signature.user_inputs
    assert [name for name in inputs if "past" in name] == [f"past_key_values_{i}" for i in range(4)]
    assert next(iter(loaded.program.state_dict.values())).dtype == torch.float32
    assert loaded.companions is not None
    written = {path.name for path in loaded.companions.save(tmp_path / "out")}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= written
    assert written == {path.name for path in (tmp_path / "out").iterdir()}
    assert spinpass.transform(loaded.program) is not loaded.program


def test_prefill_only_and_dtype(folder: Path) -> None:
    program = load_model(folder, cache=False, dtype="bfloat16").program
    assert set(program.graph_signature.user_inputs) == {"input_ids", "attention_mask"}
    assert {t.dtype for t in program.state_dict.values()} == {torch.bfloat16}
    batch, length = next(n for n in program.graph.nodes if n.name == "input_ids").meta["val"].shape
    assert not isinstance(batch, int) and not isinstance(length, int)


def test_gguf_is_dequantized_and_can_be_saved(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(gguf, cache=False)
    assert capfd.readouterr().err == ""
    assert loaded.companions is not None and loaded.companions.tokenizer is None
    loaded.companions.save(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    weight = loaded.program.state_dict["model.layers.0.mlp.down_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    for shape in [(32, 32), (16, 32), (32, 32), (16, 32), (64, 32), (64, 32)]:
        torch.randn(shape, generator=generator)
    assert torch.equal(weight, torch.randn(32, 64, generator=generator))


def test_program_file_is_taken_as_it_is(linear: ExportedProgram, tmp_path: Path) -> None:
    save_program(linear, tmp_path / "linear.pt2")
    loaded = load_model(tmp_path / "linear.pt2")
    assert loaded.companions is None
    assert torch.equal(loaded.program.state_dict["weight"], linear.state_dict["weight"])


def test_loggers_and_bars_are_put_back(folder: Path) -> None:
    theirs = importlib.import_module("transformers.utils.logging")
    gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    before = (logging.root.manager.disable, theirs.is_progress_bar_enabled(), gguf.tqdm)
    with pytest.raises(ExportError):
        load_model("no-such-model-anywhere")
    assert before == (logging.root.manager.disable, theirs.is_progress_bar_enabled(), gguf.tqdm)


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int8' is not one of float32, float16, bfloat16, auto"):
        load_model(folder, dtype="int8")


def test_model_that_is_no_decoder(tmp_path: Path) -> None:
    model: Any = models.build("t5")
    model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="transformers cannot load .*T5Config") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_weights_that_are_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ExportError, match=f"transformers cannot load {tmp_path}"):
        load_model(tmp_path)


def test_model_that_does_not_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporters = importlib.import_module("transformers.exporters")

    def fail(*_: object) -> None:
        raise RuntimeError("data-dependent branch\nat some line")

    monkeypatch.setattr(exporters.DynamoExporter, "export", fail)
    with pytest.raises(ExportError, match="cannot be exported: data-dependent branch$"):
        load_model(folder, cache=False)


@pytest.mark.parametrize(("module", "purpose"), [("transformers", "loading"), ("transformers.exporters", "exporting")])
def test_without_transformers(module: str, purpose: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(loading.importlib, "import_module", missing)
    with pytest.raises(
        ExportError, match=rf"{purpose} .* needs transformers 5 .*pip install 'spinpass\[transformers\]'"
    ):
        load_model(folder)


# -- program files ----------------------------------------------------------------------------------------------------


def test_program_with_a_cache_in_a_fresh_process(tmp_path: Path) -> None:
    """torch alone cannot read such a file: the classes of its inputs are registered on the way."""
    rotated = spinpass.transform(programs.program("llama_tied", "cache"))
    save_program(rotated, tmp_path / "rotated.pt2")
    code = (
        "import sys; from spinpass import record; from spinpass.formats.pt2 import load_program\n"
        "program = load_program(sys.argv[1])\n"
        "tensors = {t.data_ptr() for t in program.state_dict.values()}\n"
        "print(len(record.read(program).inputs), len(program.state_dict) - len(tensors))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rotated.pt2")], capture_output=True, text=True)
    found = record.read(rotated)
    assert found is not None
    assert done.stdout.split() == [str(len(found.inputs)), "1"], done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_program_with_a_cache_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_program(programs.program("llama_tied", "cache"), tmp_path / "x.pt2")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(pt2.importlib, "import_module", missing)
    with pytest.raises(
        ExportError, match=r"transformers\.\w+.*\w+, which needs transformers 5 .*spinpass\[transformers\]"
    ):
        load_program(tmp_path / "x.pt2")


def test_missing_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.pt2"):
        load_program(tmp_path / "none.pt2")


def test_file_that_is_no_archive_or_cut_short(linear: ExportedProgram, tmp_path: Path) -> None:
    save_program(linear, tmp_path / "whole.pt2")
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "whole.pt2").read_bytes()[:5000])
    (tmp_path / "text.pt2").write_text("hello")
    for name in ("cut.pt2", "text.pt2"):
        with pytest.raises(ExportError, match=f"{name} is not a .pt2 archive, or it is cut short"):
            load_program(tmp_path / name)


def test_archive_of_something_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ExportError, match=r"cannot read .*other\.pt2 as an exported program: \S.*; export it again"):
        load_program(tmp_path / "other.pt2")
    assert capfd.readouterr().err == ""  # torch's traceback is not shown


def test_save_replaces_and_leaves_nothing_else(linear: ExportedProgram, tmp_path: Path) -> None:
    target = tmp_path / "new" / "linear.pt2"
    for _ in range(2):
        save_program(linear, target)
    assert [path.name for path in target.parent.iterdir()] == ["linear.pt2"]
    assert torch.equal(load_program(target).state_dict["bias"], linear.state_dict["bias"])


def test_save_checks_what_it_is_given(linear: ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"program\.pt does not end in \.pt2"):
        save_program(linear, tmp_path / "program.pt")
    with pytest.raises(ProgramError, match="holds a torch.export.ExportedProgram, not a Linear"):
        save_program(torch.nn.Linear(2, 2), tmp_path / "x.pt2")  # type: ignore[arg-type]  # the point
    assert not list(tmp_path.iterdir())


def test_save_into_a_file_instead_of_a_folder(linear: ExportedProgram, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="a part of the path is a file"):
        save_program(linear, tmp_path / "file" / "x.pt2")


def test_save_into_a_read_only_folder(linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)  # root may write into folders without the permission
    with pytest.raises(ExportError, match="the folder is not writable"):
        save_program(linear, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_disk_full_before_writing(linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ExportError, match=r"16,640 bytes are needed and 10 are free .*the disk is full"):
        save_program(linear, tmp_path / "x.pt2")


def test_disk_full_while_writing(linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_program(linear, tmp_path / "x.pt2")
    before = (tmp_path / "x.pt2").read_bytes()

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pt2, "open", lambda *_: Full(), raising=False)
    with pytest.raises(ExportError, match="No space left on device .*the disk is full.*nothing was written"):
        save_program(linear, tmp_path / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]
    assert (tmp_path / "x.pt2").read_bytes() == before


def test_full_disk_of_the_system_does_not_kill_the_process(tmp_path: Path) -> None:
    """torch's own writer would: it throws from a destructor."""
    code = (
        "import resource, signal, sys, torch\n"
        "from spinpass.formats.pt2 import save_program\n"
        "program = torch.export.export(torch.nn.Linear(64, 64), (torch.randn(2, 64),))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n    save_program(program, sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pt2")], capture_output=True, text=True)
    assert done.stdout.startswith("ExportError cannot write to"), done.stderr
    assert "larger than this file system" in done.stdout
    assert not list(tmp_path.iterdir())


def test_program_that_torch_cannot_serialize(
    linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unsupported node\nmore")

    monkeypatch.setattr(pt2.torch.export, "save", fail)
    with pytest.raises(ExportError, match=r"torch cannot serialize the program for .*x\.pt2: unsupported node$"):
        save_program(linear, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())

"""Programs in .pt2 files, there and back, whole or not at all."""

from __future__ import annotations

import errno
import io
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
from spinpass.formats.pt2 import load_program, save_program
from tests.support import programs


@pytest.fixture(scope="module")
def linear() -> ExportedProgram:
    return torch.export.export(torch.nn.Linear(64, 64), (torch.randn(2, 64),))


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

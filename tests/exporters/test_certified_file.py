"""What the three exporters share: steps, staging, the certificate and the report."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from spinpass.certificate.certificate import Difference
from spinpass.certificate.files import FileCertificate, FileOutput
from spinpass.errors import ExportError, VerificationError
from spinpass.exporters import certified_file
from spinpass.exporters.certified_file import Clock, FileReport, write_certified
from spinpass.exporters.names import GraphNames

NAMES = GraphNames(["x"], ["y"], {"x": 0}, {0: 0})


def certificate(error: float = 0.0) -> FileCertificate:
    output = FileOutput("y", (2,), Difference(error, 1.0, 1.0), 1e-3)
    return FileCertificate((output,), torch.float32, ("x float32[2]",), "test file")


def save(path: Path) -> None:
    path.write_bytes(b"model")
    path.with_name("data").write_bytes(b"weights")


def test_files_appear_together_and_are_reported(tmp_path: Path) -> None:
    steps: list[str] = []
    clock = Clock(steps.append)
    clock.start("translate")
    seen: list[list[str]] = []

    def compare(path: Path) -> FileCertificate:
        seen.append([path.read_text(), *os.listdir(tmp_path / "new")])
        return certificate()

    report = write_certified(tmp_path / "new" / "m", NAMES, clock, save, compare)
    assert seen[0][0] == "model" and "m" not in seen[0], "compared before it is published"
    assert sorted(os.listdir(tmp_path / "new")) == ["data", "m"] == sorted(file.name for file in report.files)
    assert (report.path, report.bytes, report.inputs, report.outputs) == (tmp_path / "new" / "m", 12, ("x",), ("y",))
    assert report.certificate == certificate() and report.uncertified == ""
    assert steps == ["translate", "certify"] == list(report.seconds)


def test_the_dictionary_lists_every_field_and_is_json(tmp_path: Path) -> None:
    report = write_certified(tmp_path / "m", NAMES, Clock(None), save, lambda _: certificate())
    found = json.loads(json.dumps(report.to_dict()))
    assert list(found) == list(FileReport.KEYS) == [field.name for field in fields(FileReport)]
    assert found["path"] == str(tmp_path / "m") and found["files"] == [str(tmp_path / "data"), str(tmp_path / "m")]
    assert found["certificate"] == certificate().to_dict() and set(found["seconds"]) == {"certify"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("old")
    with pytest.raises(VerificationError, match="the test file does not compute what the program computes"):
        write_certified(tmp_path / "m", NAMES, Clock(None), save, lambda _: certificate(1.0))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match="the disk is full"):
        write_certified(tmp_path / "m", NAMES, Clock(None), fail, None)
    assert os.listdir(tmp_path) == ["m"] and (tmp_path / "m").read_text() == "old"


def test_why_there_is_no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(verify: bool | None, why: str | None = None, *, compared: bool = True) -> FileReport:
        compare = (lambda _: why or certificate()) if compared else None
        return write_certified(tmp_path / "m", NAMES, Clock(None), save, compare, weights=64, verify=verify)

    assert written(None, "no kernel").uncertified == "no kernel" and written(None, "no kernel").certificate is None
    assert written(False).uncertified == "switched off" == written(False, compared=False).uncertified
    assert list(written(False).seconds) == ["certify"] and not written(False, compared=False).seconds
    monkeypatch.setattr(certified_file, "CERTIFY_BYTES", 10)
    assert written(None).uncertified == "64 bytes of weights are above the limit of 10: pass verify=True"
    assert written(True).certificate == certificate()

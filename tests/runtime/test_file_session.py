"""A file that is checked in another process answers as one that is checked here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from spinpass.certificate import FileCertificate
from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.exporters import names
from spinpass.exporters.onnx import certificate, writer
from spinpass.runtime import DecoderSession, FileSession, file_session
from tests.support import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = models.export_hf_cache(models.build("llama_tied"))
    path = tmp_path_factory.mktemp("decoder")
    writer.export(program, path, **names.cache_names(program))
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_session, "EXTERNAL_BYTES", 0)


def logits(folder: Path) -> torch.Tensor:
    with DecoderSession(folder) as decoder:
        assert decoder.open() is None
        return torch.cat([decoder.logits([5, 9, 17]), decoder.logits([4])])


def test_logits_and_tokens_are_the_same_in_both_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = logits(folder)
    with DecoderSession(folder) as decoder:
        decoder.open()
        tokens = decoder.generate([5, 9, 17], 4, end=()).tokens
    monkeypatch.setattr(file_session, "EXTERNAL_BYTES", 0)
    assert torch.equal(logits(folder), here)
    monkeypatch.setattr(file_session, "_AT_ONCE", 1)  # a row at a time
    assert torch.equal(logits(folder), here)
    with DecoderSession(folder) as decoder:
        decoder.open()
        assert decoder.generate([5, 9, 17], 4, end=()).tokens == tokens


def test_a_certificate_is_the_same_in_both_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.export_hf_cache(models.build("llama_tied"))

    def found() -> FileCertificate:
        return certificate.certify_onnx(program, folder / "model.onnx")

    here = found()
    monkeypatch.setattr(file_session, "EXTERNAL_BYTES", 0)
    assert found().to_dict() == here.to_dict() and here.ok


@pytest.mark.usefixtures("large")
def test_a_file_of_another_program_is_found_there_too(folder: Path) -> None:
    other = models.build("llama_tied")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)  # type: ignore[union-attr]
    found = certificate.certify_onnx(models.export_hf_cache(other), folder / "model.onnx")
    with pytest.raises(VerificationError):
        found.raise_if_failed()


@pytest.mark.usefixtures("large")
def test_an_error_there_is_the_same_error_here_and_the_process_goes_on(folder: Path) -> None:
    with DecoderSession(folder) as decoder:
        decoder.open()
        with pytest.raises(ConfigError, match="no tokens to start from"):
            decoder.logits([])
        assert decoder.logits([5]).shape[0] == 1


@pytest.mark.usefixtures("large")
def test_a_process_that_is_killed_is_an_error(folder: Path) -> None:
    with FileSession(folder / "model.onnx") as session:
        session.open()
        assert session._process is not None
        os.kill(session._process._process.pid, signal.SIGKILL)
        with pytest.raises(ExportError, match=r"died \(signal 9\)") as raised:
            session.run([torch.zeros(1)])
        assert isinstance(raised.value.__cause__, MemoryError)


@pytest.mark.usefixtures("large")
def test_nobody_waits_for_an_answer_that_nobody_wants(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FileSession(folder / "model.onnx") as session:
        session.open()
        assert session._process is not None
        os.kill(session._process._process.pid, signal.SIGSTOP)  # it is busy for ever
        raise KeyboardInterrupt


@pytest.mark.usefixtures("large")
def test_the_process_ends_with_the_session(folder: Path) -> None:
    with FileSession(folder / "model.onnx") as session:
        session.open()
        assert session._process is not None
        process = session._process._process
        assert process.poll() is None
    assert process.poll() == 0
    with pytest.raises(KeyboardInterrupt), FileSession(folder / "model.onnx") as session:
        assert session._process is not None
        process = session._process._process
        raise KeyboardInterrupt
    assert process.poll() is not None

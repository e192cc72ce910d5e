"""A model folder, a program, the program rotated, and a text, made once for all commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spinpass.formats.pt2 import save_program
from tests.support import folders, programs
from tests.support.commands import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 program with a KV cache."""
    path = tmp_path_factory.mktemp("program") / "decode.pt2"
    save_program(programs.program("llama_tied", "cache", torch.float32), path)
    return path


@pytest.fixture(scope="session")
def rotated(pt2: Path) -> Path:
    path = pt2.with_name("rotated.pt2")
    result = run("rotate", pt2, path, "--json")
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(folders.WORDS[i * i % len(folders.WORDS)] for i in range(400)))
    return path

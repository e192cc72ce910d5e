"""What a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinpass.errors import ConfigError
from spinpass.loading.sources import Source, locate
from tests.support import folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.gguf_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_locate_finds_every_kind(folder: Path, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").touch()
    assert locate(folder) == Source("transformers", str(folder))
    assert locate(gguf) == locate(gguf.parent) == Source("gguf", str(gguf.parent), "tiny.gguf")
    assert locate(tmp_path / "x.pt2") == Source("program", str(tmp_path / "x.pt2"))
    for name in ("gpt2", "org/model-1.5"):
        assert locate(name) == Source("transformers", name)


@pytest.mark.parametrize("name", ["missing.pt2", "missing.gguf", "./missing", "/missing", "a/b/c", "../x", "a b"])
def test_locate_misses_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
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

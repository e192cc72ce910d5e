"""Every block of Python in the documents runs, page by page from top to bottom, on tiny models.

A page finds what a reader has: ``model`` and its ``args``, the ``program`` exported of it, ``calibration``, ``windows`` and
``other_windows`` (lists of the program's inputs), and in the working directory the folders ``MODEL`` and ``OUT``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.imports import ROOT
from spinpass import folders as written
from spinpass.config import RotationConfig
from spinpass.errors import ExportError
from spinpass.runtime import trial
from tests.support import folders
from tests.support.decoders import Decoder, exported, made, tokens
from tests.support.warm import Warm

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.M | re.S)
_ABSENT = re.compile(r"pip install '?(spinpass\[\w+\]|\w+)")
SIZES = dict(layers=1, hidden=64, ffn=128, heads=4, kv=2, head=16)


def blocks(page: Path) -> list[str]:
    """The blocks of Python of a page, each on the line that it has there."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        indent, code = block.groups()
        lines = (line.removeprefix(indent) for line in code.splitlines())
        found.append("\n" * (text[: block.start()].count("\n") + 1) + "\n".join(lines))
    return found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, warm: type[Warm]) -> Path:
    """A folder in which everything lies that the pages name."""
    root = tmp_path_factory.mktemp("desk")
    folders.model_folder(root / "MODEL", "llama", max_position_embeddings=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "Elsewhere", warm)
        written.export(str(root / "MODEL"), root / "OUT", config=RotationConfig(), bits=16)
    return root


def names() -> dict[str, Any]:
    model = made(Decoder(**SIZES), dtype=torch.float32)
    windows = [(tokens(seed=seed),) for seed in range(4)]
    program = exported(model, windows[0])
    return {
        "__name__": "__main__", "model": model, "args": windows[0], "program": program, "calibration": windows[:2],
        "windows": windows[2:], "other_windows": windows[:1],
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(page.relative_to(ROOT)) for page in WITH_CODE])
def test_the_code_of_a_page_runs(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    known = names()
    for block in blocks(page):
        try:
            exec(compile(block, str(page), "exec"), known)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")
        except ExportError as error:
            if not _ABSENT.search(str(error)):
                raise
            pytest.skip(str(error))


def test_blocks_are_found_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("a\n\n```python\nx = 1\n```\n\n- b\n\n    ```python\n    1 / 0\n    ```\n\n```text\nno\n```\n")
    first, second = blocks(tmp_path / "page.md")
    assert first.split("\n") == ["", "", "", "x = 1"] and second.split("\n")[-1] == "1 / 0" and second.count("\n") == 9
    assert len(WITH_CODE) > 8


def test_spinpass_json_has_the_keys_of_its_page(desk: Path) -> None:
    page = (ROOT / "docs/reference/spinpass-json.md").read_text(encoding="utf-8")
    keys, trials = page.split("## Trials")
    said = set(re.findall(r"^\| `(\w+)` \|", keys, re.M))
    manifest = json.loads((desk / "OUT/spinpass.json").read_text(encoding="utf-8"))
    assert said == set(manifest)
    of_trials = {key for trial in manifest["trials"] for key in trial}
    assert set(re.findall(r"^\| `(\w+)` \|", trials, re.M)) == of_trials

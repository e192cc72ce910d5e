"""What a report runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinpass.errors import ConfigError
from spinpass.evaluation.scoring import Opened, ProgramScorer
from spinpass.formats.pt2 import load_program
from spinpass.reporting.measure import ReportRequest
from tests.support import folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.program_folder(tmp_path_factory.mktemp("model"))


def test_what_is_calibrated_on_is_not_scored(folder: Path) -> None:
    class Words:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    opened = Opened(ProgramScorer(load_program(folder / "model.pt2")), None, Words())
    text = folder / "text.txt"
    scored, shown = ReportRequest("m", text, schemes=("w4",), windows=3, length=20).cut_windows(opened.tokens)
    assert len(scored) == len(shown) == 3
    assert not {i for w in scored for i in w} & {i for w in shown for i in w}
    scored, shown = ReportRequest("m", text, text, schemes=("w4",), windows=2, length=20).cut_windows(opened.tokens)
    assert len(scored) == 2 and len(shown) == 16
    assert ReportRequest("m", None, windows=2, length=20).cut_windows(opened.tokens)[1] == []
    with pytest.raises(ConfigError, match="at least one window"):
        ReportRequest("m", text, windows=0).cut_windows(opened.tokens)

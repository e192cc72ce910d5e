"""A model scored from Python: what ``spinpass eval`` does, without a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spinpass.errors import ConfigError
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.evaluation.request import EvalRequest
from spinpass.formats.pt2 import save_program
from spinpass.progress import Silent
from tests.support import folders, programs


def test_a_program_alone_and_beside_the_rotated_one(tmp_path: Path) -> None:
    save_program(programs.program("llama_tied", "hf", torch.float32), tmp_path / "model.pt2")
    folders.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(folders.WORDS * 4))
    given = dict(text=tmp_path / "text.txt", windows=2, length=16, tokenizer=str(tmp_path))
    alone = EvalRequest(str(tmp_path / "model.pt2"), **given).run(Silent())  # type: ignore[arg-type]
    assert isinstance(alone.main, Perplexity) and alone.main.tokens == 2 * 15 and not alone.files
    steps = Silent()
    both = EvalRequest(str(tmp_path / "model.pt2"), rotate="online", **given).run(steps)  # type: ignore[arg-type]
    assert isinstance(both.main, Comparison) and both.main.before == alone.main
    assert both.main.ratio == pytest.approx(1, abs=1e-5) and "rotate" in steps.seconds
    assert json.loads(json.dumps(both.to_dict()))["agreement"] == 1.0


def test_what_means_nothing_is_refused_before_the_work() -> None:
    with pytest.raises(ConfigError, match="--against compares two models as they are"):
        EvalRequest("nowhere", against="elsewhere", rotate="online")
    with pytest.raises(ConfigError, match="0 windows to calibrate on: choose 1 or more"):
        EvalRequest("nowhere", calibration_windows=0)

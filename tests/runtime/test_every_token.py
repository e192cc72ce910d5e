"""A file with the logits of the last token is scored as one with those of every token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spinpass.errors import ExportError
from spinpass.evaluation import ProgramScorer
from spinpass.exporters import cache_names
from spinpass.exporters.onnx import export
from spinpass.passes import last_token
from spinpass.runtime import OrtDecoder
from spinpass.runtime.every_token import every_token_model
from tests.support import models

IDS = [5, 9, 3, 7, 1, 4, 8]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("fuse", [True, False])
def test_all_logits_of_a_file_with_the_last(tmp_path: Path, fuse: bool, external: bool) -> None:
    program = models.export_hf_cache(models.build("llama"))
    short = last_token(program)
    export(short, tmp_path, fuse=fuse, external_data=external, verify=False, **cache_names(short))
    decoder, expected = OrtDecoder(tmp_path), ProgramScorer(program).logits(IDS)
    found = decoder.logits(IDS)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)
    state = decoder.graph.start(1)
    one = decoder.graph.step(torch.tensor([IDS]), state)
    assert one.shape[1] == 1 and torch.allclose(one[0, -1].float(), found[-1], atol=1e-4)
    assert decoder.generate(IDS, 3, end=()).tokens[0] == int(expected[-1].argmax())


def test_what_picks_nothing_is_said(tmp_path: Path) -> None:
    program = models.export_hf_cache(models.build("llama"))
    report = export(program, tmp_path, verify=False, **cache_names(program))
    with pytest.raises(ExportError, match="what picks it is not found: export it with --all-logits"):
        every_token_model(report.path, "logits")

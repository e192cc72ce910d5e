"""The traces that other tests take again are those that would be made."""

from __future__ import annotations

from typing import Any

import torch

from spinpass.execution import run
from spinpass.loading.decoder import export_decoder
from tests.support import models
from tests.support.traced import Remembered


def test_a_trace_is_taken_again_with_other_weights() -> None:
    remembered = Remembered(export_decoder)
    one, other = (models.build("llama_tied") for _ in range(2))
    first, kept = remembered(one), {name: tensor.clone() for name, tensor in one.state_dict().items()}
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.mul_(1.5)
    second, real = remembered(other), export_decoder(other)
    assert remembered.count == 1
    for found, expected in zip(run(second, real.example_inputs), run(real, real.example_inputs), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(first.state_dict[name], kept[name]) for name in first.state_dict)
    assert {t.data_ptr() for t in second.state_dict.values()} == {t.data_ptr() for t in real.state_dict.values()}


def test_what_differs_is_traced() -> None:
    remembered = Remembered(export_decoder)
    for name in ("llama", "llama_tied"):
        model: Any = models.build(name)
        remembered(model)
        remembered(model, one_by_one=True)
        remembered(model.double())
    assert remembered.count == 6

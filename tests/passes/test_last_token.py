"""The head on the last token alone: the same logits, the same caches, and refusals where it is no head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ConfigError
from spinpass.execution.interpreter import run
from spinpass.execution.synthetic import synthetic_inputs
from spinpass.graph import op_name
from spinpass.passes.last_token import last_token
from spinpass.quantization import quantize
from tests.support import programs

BATCH, TOKENS, HIDDEN, VOCAB = 2, 5, 8, 11


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "granite"])  # a scale, a cap, a division behind the head
@pytest.mark.parametrize("form", [None, "online", "offline"])
def test_the_same_logits_and_caches(name: str, form: str | None) -> None:
    program = programs.program(name, "cache", torch.float32)
    if form is not None:
        config = spinpass.RotationConfig(form=form, rotations=("R1", "R3"), verify=False)  # type: ignore[arg-type]
        program = spinpass.transform(program, config)
    changed = last_token(program)
    inputs = synthetic_inputs(program)
    whole, last = run(program, inputs), run(changed, inputs)
    assert last[0].shape == (whole[0].shape[0], 1, whole[0].shape[2]) and whole[0].shape[1] > 1
    torch.testing.assert_close(last[0], whole[0][:, -1:], atol=1e-5, rtol=1e-5)
    for a, b in zip(whole[1:], last[1:], strict=True):
        assert torch.equal(a, b)
    assert (record.read(changed) is None) == (form is None)


def test_roundings_in_front_of_the_head_stay() -> None:
    program = programs.program("llama_tied", "cache", torch.float32)
    made = quantize(program, "w8-rtn-a8-head8", []).program
    changed = last_token(made)
    inputs = synthetic_inputs(made)
    torch.testing.assert_close(run(changed, inputs)[0], run(made, inputs)[0][:, -1:], atol=1e-4, rtol=1e-4)
    roundings = [[op_name(n) for n in p.graph.nodes].count("spinpass::round_tokens") for p in (made, changed)]
    assert roundings[0] == roundings[1] > 0


def test_what_belongs_to_the_head_stays_beside_it() -> None:
    """An exporter puts a rounding and the product behind it into one kernel: the token is picked in front of both."""
    made = quantize(programs.program("llama_tied", "cache", torch.float32), "w4g16-rtn-a8-head8", []).program
    logits = next(iter(last_token(made).graph.find_nodes(op="output"))).args[0][0]  # type: ignore[index, union-attr]
    while op_name(logits) != "aten::linear":  # type: ignore[arg-type]
        logits = logits.args[0]  # type: ignore[union-attr]
    rounding = logits.args[0]  # type: ignore[union-attr]
    assert op_name(rounding) == "spinpass::round_tokens" and rounding.meta["val"].shape[1] == 1  # type: ignore[arg-type, union-attr]


class Head(nn.Module):
    def __init__(self, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.behind = nn.Linear(HIDDEN, VOCAB), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.linear(x), x)


def exported(behind: Callable[[Tensor, Tensor], Tensor]) -> ExportedProgram:
    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return torch.export.export(Head(behind).eval(), (torch.randn(BATCH, TOKENS, HIDDEN),), dynamic_shapes=shapes)


def test_one_value_read_twice_is_token_by_token() -> None:
    program = exported(lambda y, x: y + y)
    inputs = synthetic_inputs(program)
    torch.testing.assert_close(run(last_token(program), inputs)[0], run(program, inputs)[0][:, -1:])


@pytest.mark.parametrize(
    ("behind", "why"),
    [
        (lambda y, x: y.cumsum(1), "aten::cumsum"),
        (lambda y, x: y[:, :-1], "aten::slice"),
        (lambda y, x: y + x.sum(-1, keepdim=True), "depend on several values"),
        (lambda y, x: y.sum(1), "no tensor of logits"),
        (lambda y, x: y * torch.arange(x.shape[1])[None, :, None], "depend on several values"),
    ],
)
def test_what_is_not_token_by_token_is_refused(behind: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        last_token(exported(behind))

"""Tokens count by how much the predictions depend on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spinpass.errors import ConfigError
from spinpass.execution import recomputed
from spinpass.execution.interpreter import run
from spinpass.quantization import quantize
from spinpass.quantization.calibration import curvature, token_counts
from spinpass.quantization.rounding import Moments
from spinpass.workers import Team
from tests.support.decoders import exported
from tests.support.quantizable import inputs, program

WIDTH, TOKENS, KINDS = 64, 256, 8
NAME = "up.weight"


class Silenced(nn.Module):
    """Tokens whose first value is negative are scaled down behind the layer, so that no prediction sees them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, KINDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heard = torch.where(x[..., :1] > 0, 1.0, 1e-3)
        return self.head(torch.nn.functional.gelu(self.up(x)) * heard)  # type: ignore[no-any-return]


def silenced() -> tuple[torch.export.ExportedProgram, list[tuple[Tensor]]]:
    """The program, and texts whose unheard tokens lie along other directions than those that are heard."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2, WIDTH // 8, WIDTH, generator=generator)
    found = []
    for _ in range(4):
        which = torch.randint(0, 2, (1, TOKENS), generator=generator)
        x = torch.einsum("btk,btkn->btn", torch.randn(1, TOKENS, WIDTH // 8, generator=generator), directions[which])
        x = x + 0.1 * torch.randn(1, TOKENS, WIDTH, generator=generator)
        x[..., 0] = (which * 2 - 1) * x[..., 0].abs()
        found.append((x,))
    model = Silenced().eval()
    return exported(model, found[0]), found


def divergence(before: Any, after: Any, texts: list[tuple[Tensor]]) -> float:
    total = 0.0
    for (x,) in texts:
        p, q = (torch.log_softmax(run(each, (x,))[0].double(), -1) for each in (before, after))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total


def test_tokens_that_nobody_hears_hardly_count() -> None:
    made, texts = silenced()
    counts = token_counts(made, [NAME], texts, Team(), None)[NAME]
    assert torch.cat(counts).mean() == pytest.approx(1.0, rel=1e-5)
    heard = torch.cat([x[0, :, 0] > 0 for (x,) in texts])
    counted = torch.cat(counts)
    assert counted[~heard].max() < 0.05 and counted[heard].mean() > 1


def test_the_error_goes_where_nobody_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = silenced()
    plain, weighed = (divergence(made, quantize(made, f"w2-gptq{part}", texts).program, texts) for part in ("", "-fisher"))
    assert weighed < 0.8 * plain
    monkeypatch.setattr(curvature, "curvature", lambda x, g: g.square().mean(-1).flatten().flip(0))  # of other tokens
    assert divergence(made, quantize(made, "w2-gptq-fisher", texts).program, texts) > weighed


def test_a_token_that_counts_twice_is_one_that_comes_twice() -> None:
    x, y = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    counted = Moments.of([x], [y], None, [torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])])
    order = [0, 1, 1, 3, 4]
    repeated = Moments.of([x[order]], [y[order]])
    for part in ("own", "cross", "original"):
        torch.testing.assert_close(getattr(counted, part), getattr(repeated, part), rtol=1e-5, atol=1e-5)


def test_a_program_without_logits_is_refused() -> None:
    made = exported(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Flatten(0)).eval(), (torch.randn(1, 16),))
    with pytest.raises(ConfigError, match="logits are needed"):
        quantize(made, "w4-gptq-fisher", [(torch.randn(1, 16),)])


def test_only_what_is_asked_for_is_weighed() -> None:
    names = ["blocks.0.mlp.up.weight"]
    assert list(token_counts(program(), names, inputs(2), Team(), None)) == names
    assert token_counts(program(), [], inputs(2), Team(), None) == {}


class TwoOutputs(nn.Module):
    """What the second layer returns is no logit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_a_layer_that_no_prediction_depends_on_is_rounded_as_without() -> None:
    made = exported(TwoOutputs().eval(), (torch.randn(3, 5, 16),))
    assert list(token_counts(made, ["first.weight", "second.weight"], [made.example_inputs[0]], Team(), None)) == ["first.weight"]


def test_values_that_are_computed_twice_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"blocks.{k}.mlp.down.weight" for k in (0, 1)]
    once = token_counts(program(), names, inputs(2), Team(), None)
    monkeypatch.setattr(recomputed.first_output, "__kwdefaults__", {"most": 0, "watch": None})
    twice = token_counts(program(), names, inputs(2), Team(), None)
    for name in names:
        torch.testing.assert_close(torch.cat(twice[name]), torch.cat(once[name]))


class Unheard(nn.Module):
    """A layer behind which no gradient comes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.up, self.head = how, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, KINDS)

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        if self.how == "detached":
            y = y.detach()
        if self.how == "not a number":
            y = y / 0 * 0
        made = self.head(x + y)
        return (self.head(x), made) if self.how == "another output" else made


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("detached", "no prediction depends on what a layer that is rounded returns: .*'fisher'"),
        ("another output", "no prediction depends on what a layer that is rounded returns: .*'fisher'"),
        ("not a number", "what the program predicts for input 1 is no number"),
    ],
)
def test_predictions_that_tell_nothing_of_a_layer_are_refused(how: str, why: str) -> None:
    _, texts = silenced()
    made = exported(Unheard(how).eval(), texts[0])
    with pytest.raises(ConfigError, match=why):
        quantize(made, "w4-gptq-fisher", texts)


def test_tokens_of_a_layer_whose_gradients_overflow_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = silenced()
    monkeypatch.setattr(curvature, "curvature", lambda tokens, g: torch.full(tokens, torch.inf).flatten())
    counts = token_counts(made, [NAME], texts, Team(), None)[NAME]
    assert all(torch.equal(each, torch.ones(TOKENS)) for each in counts)

"""What a quantized program learns: a smaller divergence from the original, and never a larger one."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor

import spinpass
from spinpass.errors import ConfigError
from spinpass.execution import likelihoods, recomputed
from spinpass.execution.interpreter import run
from spinpass.learning import Learning, Lesson, values
from spinpass.quantization import QuantizationConfig, Quantized, learned, pack, quantize
from spinpass.quantization.learned import learn as learning
from tests.support.quantizable import inputs, program


@cache
def made(scheme: str = "w2g16-rtn-asym-a8") -> Quantized:
    return quantize(program(), scheme)


def divergence(quantized: Quantized) -> float:
    """On inputs that were not trained on: KL to the original program, per token."""
    total = 0.0
    for ids in inputs(8)[4:]:
        wanted, found = (torch.log_softmax(run(p, ids)[0].double(), -1) for p in (program(), quantized.program))
        total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return total


def test_scales_come_closer_to_the_original_program() -> None:
    trained = learned(program(), made(), inputs(), Learning(rounds=4, rate=20))
    assert divergence(trained) < 0.9 * divergence(made())
    moved = 0
    for name, before in made().report.weights.items():
        after = trained.report.weights[name]
        assert torch.equal(before.codes.q, after.codes.q) and torch.equal(before.codes.zeros, after.codes.zeros)
        assert (after.codes.scales > 0).all()
        moved += not torch.equal(before.codes.scales, after.codes.scales)
    assert moved == len(made().report.weights)


def test_the_program_computes_what_the_report_says() -> None:
    trained = learned(program(), made(), inputs(), Learning(rate=20))
    (ids, *_) = inputs()
    assert torch.equal(run(trained.program, ids)[0], run(pack(trained).program, ids)[0])
    assert not torch.equal(run(trained.program, ids)[0], run(made().program, ids)[0])


def test_a_step_that_does_harm_is_not_taken() -> None:
    found = learned(program(), made(), inputs(), Learning(rate=3000))
    kept, before = found.program.state_dict, made().program.state_dict
    assert kept.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert all(weight is made().report.weights[name] for name, weight in found.report.weights.items())
    said = found.report.learning
    assert said is not None and not said.kept and said.after > said.before and said.inputs == 1
    assert said.summary.startswith("learned scales and dropped them: the divergence went from ")
    assert found.report.to_dict()["learning"]["kept"] is False


def test_no_input_is_changed() -> None:
    before = {name: t.clone() for name, t in made().program.state_dict.items()}
    teacher = {name: t.clone() for name, t in program().state_dict.items()}
    learned(program(), made(), inputs(), Learning(rate=20))
    assert all(torch.equal(t, before[name]) for name, t in made().program.state_dict.items())
    assert all(torch.equal(t, teacher[name]) for name, t in program().state_dict.items())
    assert all(t.grad is None for t in program().state_dict.values())


def test_gradients_reach_the_scales_through_the_whole_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a difference quotient of the loss along the gradient, in a program whose inputs are not rounded."""
    quantized = quantize(program(), "w4g16-rtn")
    made = learning._Learner(program(), quantized, ["scales"])
    (ids, *_) = inputs()

    def loss() -> Tensor:
        return Lesson(made.program, program(), [ids], [ids]).loss(ids, values(made.parts))

    torch.autograd.backward(loss())
    moves = [part.moves["scales"] for part in made.parts]
    slopes = [move.grad.clone() for move in moves if move.grad is not None]
    assert len(slopes) == len(moves)
    step, length = 2e-3, sum(float(g.square().sum()) for g in slopes) ** 0.5
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for move, slope in zip(moves, slopes, strict=True):
                move.copy_(sign * step * slope / length)
        found.append(float(loss().detach()))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(length, rel=0.05)


def test_a_scheme_can_ask_for_it() -> None:
    assert QuantizationConfig.parse("w4-rtn-distill").learn == Learning()
    assert QuantizationConfig.parse("w4-rtn-learn12").learn == Learning(("scales", "offsets"), rounds=12)
    assert QuantizationConfig.parse("w4-rtn-distill").needs_calibration
    plain, trained = (quantize(program(), scheme, inputs()) for scheme in ("w2-rtn", "w2-rtn-distill8"))
    assert divergence(trained) < divergence(plain)
    rotated = spinpass.transform(program(), spinpass.RotationConfig(form="online", verify=False))
    assert quantize(rotated, "w2-rtn-distill8", inputs()).report.weights.keys() == plain.report.weights.keys()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="learning needs calibration inputs"):
        learned(program(), made(), [])
    with pytest.raises(ConfigError, match="learning and bits on average need calibration inputs"):
        quantize(program(), "w4-rtn-distill")
    with pytest.raises(ConfigError, match="-1 rounds of learning"):
        Learning(rounds=-1)
    with pytest.raises(ConfigError, match="'scale' is nothing that can be learned; the nearest is 'scales'"):
        learned(program(), made(), inputs(), Learning(("scale",)))


def test_it_is_trained_on_inputs_of_its_own_where_there_are_some() -> None:
    scheme = "w2g16-rtn-asym-a8-distill"
    for training, held_out in ((None, 1), (inputs(40), 2)):
        said = quantize(program(), scheme, inputs(), training=training).report.learning
        assert said is not None and said.inputs == held_out


def test_values_that_are_computed_twice_train_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learned(program(), made(), inputs(), Learning(rate=20))
    monkeypatch.setattr(likelihoods, "first_output", partial(recomputed.first_output, most=0))
    found = learned(program(), made(), inputs(), Learning(rate=20))
    for name, weight in expected.report.weights.items():
        torch.testing.assert_close(found.report.weights[name].codes.scales, weight.codes.scales, rtol=1e-5, atol=0)

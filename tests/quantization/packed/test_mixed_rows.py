"""Several widths within a weight: a sum of layers of one width each, and no worse than the same bits everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spinpass.errors import ConfigError
from spinpass.execution.interpreter import run
from spinpass.quantization import QuantizationConfig, Weights, pack, quantize, unpack
from spinpass.quantization.rounding.gptq import rounded_by_gptq
from spinpass.quantization.rounding.grid import Codes, rounded
from tests.support.matrices import normal
from tests.support.quantizable import error, inputs, outlying, program

WIDTHS = (4, 2, 8, 2)


def put_together(codes: Codes) -> Tensor:
    whole = torch.full(codes.q.shape, torch.nan)
    for columns, part in codes.parts().values():
        assert part.group_bits is None and int(part.q.max()) < 2**part.bits
        whole[:, columns] = part.dequantized()
    return whole


@pytest.mark.parametrize("columns", [64, 56])
@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_are_the_whole(columns: int, symmetric: bool) -> None:
    how = Weights(4, 16, symmetric=symmetric, method="rtn", group_bits=WIDTHS)
    codes = rounded(normal(8, columns), how)
    assert list(codes.parts()) == [2, 4, 8] and codes.bits == 8
    assert torch.equal(put_together(codes), codes.dequantized())
    for group, bits in enumerate(WIDTHS):
        at = slice(16 * group, 16 * group + 16)
        alone = rounded(normal(8, columns)[:, at], Weights(bits, 16, symmetric=symmetric, method="rtn"))
        assert torch.equal(codes.q[:, at], alone.q) and torch.equal(codes.dequantized()[:, at], alone.dequantized())
    assert (
        codes.nbytes
        == sum(part.nbytes for _, part in codes.parts().values())
        < rounded(normal(8, columns), Weights(8, 16)).nbytes
    )


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_keeps_every_group_on_its_grid(order: bool, symmetric: bool) -> None:
    x = normal(200, 64, seed=1) @ (normal(64, 64, seed=2) * 0.2 + torch.eye(64))
    how = Weights(4, 16, symmetric, act_order=order, group_bits=WIDTHS)
    codes, hessian = rounded_by_gptq(normal(8, 64), x.T @ x, how), (x.T @ x).double()
    assert torch.equal(put_together(codes), codes.dequantized())
    for group, bits in enumerate(WIDTHS):
        part = codes.q[:, 16 * group : 16 * group + 16]
        assert int(part.max()) <= 2**bits - 1 and (codes.zeros[:, group] <= 2**bits - 1).all()

    def lost(of: Codes) -> float:
        off = (of.dequantized() - normal(8, 64)).double()
        return float(((off @ hessian) * off).sum())

    assert lost(codes) < 0.8 * lost(rounded(normal(8, 64), how))


def test_groups_that_are_not_named_have_the_bits_of_the_weight() -> None:
    codes = rounded(normal(8, 64), Weights(3, 16, group_bits=(8,)))
    assert codes.group_bits == (8, 3, 3, 3)
    assert rounded(normal(8, 64), Weights(3, 16, group_bits=(3, 3))).group_bits is None, "one width is no mixture"


@pytest.mark.parametrize("scheme", ["w3.5g16-rows", "w2.6g16-rtn-asym-rows-a8", "w3.1g16-rows-order-kv8"])
def test_a_layer_becomes_the_sum_of_its_widths(scheme: str) -> None:
    result = quantize(program(), scheme, inputs())
    weights = result.report.weights
    parts = {name for name in weights if ".bits" in name}
    assert parts and all(".inputs" in name for name in result.program.state_dict if name.endswith("inputs"))
    average = sum(w.codes.bits * w.codes.q.numel() for w in weights.values()) / sum(
        w.codes.q.numel() for w in weights.values()
    )
    budget = QuantizationConfig.parse(scheme).average_bits
    assert budget is not None and budget - 0.2 < average <= budget
    for name in {part.rsplit(".bits", 1)[0] for part in parts}:  # every input is read once
        places = [
            t
            for key, t in result.program.state_dict.items()
            if key.startswith(f"{name}.bits") and key.endswith("inputs")
        ]
        assert torch.cat(places).sort().values.tolist() == list(range(sum(map(len, places))))
        assert f"{name}.weight" not in result.program.state_dict
    packed = pack(result)
    assert not packed.kept
    (ids, *_) = inputs()
    expected = run(result.program, ids)[0]
    assert torch.equal(run(packed.program, ids)[0], expected)
    assert torch.equal(run(unpack(packed.program), ids)[0], expected)


def test_inputs_far_above_the_others_get_more_bits() -> None:
    mixed, even = (quantize(outlying(), scheme, inputs()) for scheme in ("w3.0g16-rtn-rows", "w3g16-rtn"))
    assert error(outlying(), mixed.program) < 0.8 * error(outlying(), even.program)


def test_a_skipped_input_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the layers is the layer: leave out one input, and the program is another."""
    exact = quantize(program(), "w8g16-rtn")
    how = {"blocks.0.mlp.up.weight": Weights(8, 16, method="rtn", group_bits=(4, 8))}
    config = QuantizationConfig(weights=Weights(8, 16, method="rtn"), overrides=how)
    kept = error(exact.program, quantize(program(), config).program)
    whole = Codes.parts
    monkeypatch.setattr(Codes, "parts", lambda self: dict(reversed(whole(self).items())))
    assert error(exact.program, quantize(program(), config).program) == pytest.approx(kept), "order does not matter"
    monkeypatch.setattr(Codes, "parts", lambda self: {b: (c.roll(1), p) for b, (c, p) in whole(self).items()})
    assert error(exact.program, quantize(program(), config).program) > 2 * kept


def test_weights_that_something_else_reads_have_one_width() -> None:
    class Tied(nn.Module):
        """The second layer's weight is also looked up in."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.up, self.head = nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.up(self.table(ids)) * self.up.weight[0]
            return self.head(x)  # type: ignore[no-any-return]

    ids = torch.arange(12)[None]
    tied = torch.export.export(Tied().eval(), (ids,))
    result = quantize(
        tied, QuantizationConfig(Weights(3, 16, method="rtn"), average_bits=3.5, mixed_rows=True), [(ids,)]
    )
    assert set(result.report.weights) == {"up.weight"}
    named = QuantizationConfig(overrides={"up.weight": Weights(4, 16, method="rtn", group_bits=(2, 4))})
    with pytest.raises(ConfigError, match=r"up\.weight cannot have groups of several widths: .* reads it too"):
        quantize(tied, named, [(ids,)])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="name their group_size"):
        Weights(4, group_bits=(2, 4))
    with pytest.raises(ConfigError, match="weights of 5 bits"):
        Weights(4, 16, group_bits=(5,))
    for scheme in ("w4g16-rows", "w3.5-rows", "a8-rows"):
        with pytest.raises(ConfigError, match="name average_bits and a group_size"):
            QuantizationConfig.parse(scheme)

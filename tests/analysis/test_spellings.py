"""However a norm, its scale or a second result is spelled, the residual stream is found and rotated offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import spinpass
from spinpass.analysis import Polynomial, Statistics, Symbol, statistics
from spinpass.errors import VerificationError
from spinpass.graph import ProgramEditor, op_name
from spinpass.passes import collect_affine, open_program

H = 48
EPS = 1e-5
MEANS = torch.linspace(-0.5, 0.5, H, dtype=torch.float64)
VARIANCES = torch.linspace(0.5, 2, H, dtype=torch.float64)
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def of_sums(x: Tensor, g: Tensor, b: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
    c = x - share(x.sum(-1, keepdim=True))
    return c * torch.rsqrt(share((c**2).sum(-1, keepdim=True)) + EPS) * g + b


def of_moments(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    m = x.mean(-1)
    return (x - m.unsqueeze(-1)) * torch.rsqrt((x * x).mean(-1) - m.pow(2) + EPS).unsqueeze(-1) * g + b


def moved_apart(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    r = torch.rsqrt(mean(x * x) - mean(x) ** 2 + EPS)
    return (x * r - mean(x) * r) * g + b


def expanded(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    c = x - mean(x).expand_as(x)
    return c * torch.rsqrt(mean(c.square()) + EPS).expand_as(c) * g.expand_as(c) + b


def of_results(made: Callable[..., Any], root: bool, x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    v, m = made(x, -1, keepdim=True, unbiased=False)
    return (x - m) / (v if root else torch.sqrt(v + EPS)) * g + b


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (H,))


def of_means(m: Tensor, v: Tensor, x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    return (x - m) * torch.rsqrt(v + EPS) * g + b


def batch_normed(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """Between a norm and its linear, as a scale and a shift that were found in training."""
    return F.batch_norm(rms(x).mT, MEANS, VARIANCES, g.detach(), b.detach()).mT


def ones_of(x: Tensor) -> Tensor:
    return torch.ones(H, 1, dtype=x.dtype)


def scaled_again(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    h = rms(x)
    return h + h * g


NORMS: dict[str, Norm] = {
    "var": lambda x, g, b: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * g + b,
    "var, unbiased": lambda x, g, b: (x - mean(x)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * g + b,
    "var of the centred": lambda x, g, b: (x - mean(x)) * torch.rsqrt((x - mean(x)).var(-1)[..., None] + EPS) * g,
    "std": lambda x, g, b: g * (x - mean(x)) / (x.std(-1, keepdim=True) + EPS) + b,
    "var_mean": lambda x, g, b: of_results(torch.var_mean, False, x, g, b),
    "std_mean": lambda x, g, b: of_results(torch.std_mean, True, x, g, b),
    "sum / H": lambda x, g, b: of_sums(x, g, b, lambda s: s / H),
    "sum · 1/H": lambda x, g, b: of_sums(x, g, b, lambda s: s * (1 / H)),
    "E[x²] − E[x]²": of_moments,
    "x·r − m·r": moved_apart,
    "−m added": lambda x, g, b: (x + (-mean(x))) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * g + b,
    "all expanded": expanded,
    "group_norm": lambda x, g, b: F.group_norm(x.reshape(-1, H), 1, g, b, EPS).view(x.shape),
    "instance_norm": lambda x, g, b: F.instance_norm(x.reshape(1, -1, H)).view(x.shape) * g + b,
    "normalize": lambda x, g, b: F.normalize(x, dim=-1) * g * H**0.5,
    "linalg.norm": lambda x, g, b: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + EPS) * g,
    "einsum": lambda x, g, b: x * torch.rsqrt(torch.einsum("bsh,bsh->bs", x, x)[..., None] / H + EPS) * g,
    "mean by a product": lambda x, g, b: of_means(x @ ones_of(x) / H, x.var(-1, keepdim=True), x, g, b),
    "mean by a linear": lambda x, g, b: of_means(F.linear(x, ones_of(x).mT / H), x.var(-1, keepdim=True), x, g, b),
    "mean by einsum": lambda x, g, b: of_means(
        torch.einsum("bsh->bs", x)[..., None] / H, x.var(-1, keepdim=True), x, g, b
    ),
    "mean by pooling": lambda x, g, b: of_means(F.avg_pool1d(x, H), x.var(-1, keepdim=True), x, g, b),
    "mean by adaptive pooling": lambda x, g, b: of_means(F.adaptive_avg_pool1d(x, 1), x.var(-1, keepdim=True), x, g, b),
    "E[x²] by einsum": lambda x, g, b: of_means(
        mean(x), torch.einsum("bsh,bsh->bs", x, x)[..., None] / H - mean(x) ** 2, x, g, b
    ),
    "E[x²] by a norm": lambda x, g, b: of_means(
        mean(x), torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / H - mean(x) ** 2, x, g, b
    ),
    "E[|x|²]": lambda x, g, b: of_means(mean(x), mean(x.abs() ** 2) - mean(x) ** 2, x, g, b),
    "LayerNorm of x / 2 + 1": lambda x, g, b: F.layer_norm(x / 2 + 1, (H,), g, b),
    "RMSNorm of a LayerNorm": lambda x, g, b: F.rms_norm(F.layer_norm(x, (H,)), (H,), g),
    "LayerNorm of a LayerNorm": lambda x, g, b: F.layer_norm(F.layer_norm(x, (H,)), (H,), g, b),
    "scale twice": lambda x, g, b: rms(x) * g * b.exp(),
    "scale before the statistic": lambda x, g, b: x * (torch.rsqrt(mean(x * x) + EPS) * g),
    "h + h·g": scaled_again,
    "shift subtracted": lambda x, g, b: rms(x) * g - b,
    "shift minus it": lambda x, g, b: b - rms(x) * g,
    "shift before the scale": lambda x, g, b: (rms(x) + b) * g,
    "one added behind the scale": lambda x, g, b: rms(x) * g + 1,
    "scale by addcdiv": lambda x, g, b: torch.addcdiv(b, rms(x), g, value=2),
    "scale by lerp to the shift": lambda x, g, b: torch.lerp(rms(x), b, g),
    "lerp by a number": lambda x, g, b: torch.lerp(rms(x) * g, b, 0.25),
    "batch norm": batch_normed,
    "scale by division": lambda x, g, b: rms(x) / g,
    "scale by addcmul": lambda x, g, b: torch.addcmul(b, rms(x), g),
    "scale by addcmul, value": lambda x, g, b: torch.addcmul(b, g, rms(x), value=0.5),
    "scale by lerp": lambda x, g, b: torch.lerp(b, rms(x), g),
    "scale by lerp from 0": lambda x, g, b: torch.lerp(torch.zeros((), dtype=x.dtype), rms(x), g),
    "scale expanded": lambda x, g, b: rms(x) * g.expand(x.shape),
    "scale repeated": lambda x, g, b: rms(x) * g.repeat(x.shape[1], 1),
}


class Stream(nn.Module):
    def __init__(self, norm: Norm, aside: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, H)
        self.up, self.down = (nn.ModuleList(nn.Linear(*io) for _ in range(2)) for io in ((H, 96), (96, H)))
        self.g = nn.Parameter(torch.rand(3, H) + 0.5)
        self.b = nn.Parameter(torch.randn(3, H) * 0.1)
        self.head = nn.Linear(H, 50, bias=False)
        self.norm, self.aside = norm, aside

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        for layer, (up, down) in enumerate(zip(self.up, self.down)):
            x = x + down(F.gelu(up(self.norm(x, self.g[layer], self.b[layer]))))
        y = self.head(self.norm(x, self.g[2], self.b[2]))
        return (y,) if self.aside is None else (y, self.aside(x))


def program(norm: Norm, aside: Callable[[Tensor], Tensor] | None = None) -> ExportedProgram:
    return export(Stream(norm, aside).double().eval(), (torch.randint(0, 50, (2, 5)),))


def stream_of(exported: ExportedProgram) -> Any:
    """Return the residual stream as it is planned, the certificate being good."""
    rotated = spinpass.rotate(exported, spinpass.RotationConfig(form="offline", verify=True))
    assert rotated.certificate is not None and rotated.certificate.ok
    return next((s for s in rotated.plan.spaces if s.name == "R1:residual"), rotated.plan.refusals)


@pytest.mark.parametrize("spelling", NORMS)
def test_the_stream_is_rotated_offline(spelling: str) -> None:
    stream = stream_of(program(NORMS[spelling]))
    assert not stream.online, stream


def test_a_sum_inside_a_layer_is_called_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer's result plus its cube, as some activations are spelled: beside a stream it is not worth a word."""
    monkeypatch.setattr(F, "gelu", lambda h: h * torch.tanh(h + 0.04 * h**3))
    plan = spinpass.plan(program(NORMS["scale expanded"]), spinpass.RotationConfig(form="offline"))
    assert any(s.name.startswith("R1") for s in plan.spaces) and "can read it rotated" not in str(plan)


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x − f": lambda x, f: x - f,
    "f − x": lambda x, f: torch.rsub(x, f),
    "x + (−f)": lambda x, f: x + (-f),
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "lerp": lambda x, f: torch.lerp(x, f, 0.5),
    "lerp by tokens": lambda x, f: torch.lerp(x, f, torch.sigmoid(mean(x * x))),
    "addcmul by tokens": lambda x, f: torch.addcmul(x, f, torch.sigmoid(mean(x * x))),
    "addcdiv by tokens": lambda x, f: torch.addcdiv(x, f, 1 + mean(x * x)),
    "in place": lambda x, f: x.clone().add_(f),
}


class Summed(Stream):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda x, g, b: rms(x) * g)
        self.add = add

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids)
        for layer, (up, down) in enumerate(zip(self.up, self.down)):
            x = self.add(x, down(F.gelu(up(self.norm(x, self.g[layer], self.b[layer])))))
        return self.head(self.norm(x, self.g[2], self.b[2]))


@pytest.mark.parametrize("spelling", SUMS)
def test_a_residual_sum_is_found_however_it_is_spelled(spelling: str) -> None:
    stream = stream_of(export(Summed(SUMS[spelling]).double().eval(), (torch.randint(0, 50, (2, 5)),)))
    assert not stream.online, stream


HEADS = (4, H // 4)
ASIDE: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "a Gram matrix": (0, lambda x: x @ x.transpose(-1, -2)),
    "viewed as heads": (1, lambda x: x.unflatten(-1, HEADS)),
    "a Gram matrix of heads": (1, lambda x: torch.einsum("bshd,bthd->bhst", *[x.unflatten(-1, HEADS)] * 2)),
    "squares summed by heads": (1, lambda x: x.unflatten(-1, HEADS).square().sum(-1)),
    "flipped": (1, lambda x: x.flip(-1)),
    "a covariance": (2, lambda x: x.transpose(-1, -2) @ x),
    "an outer product": (2, lambda x: x.unsqueeze(-1) * x.unsqueeze(-2)),
    "one channel": (1, lambda x: x[..., 0]),
}


@pytest.mark.parametrize("aside", ASIDE)
def test_a_second_result_costs_what_it_reads_and_not_the_stream(aside: str) -> None:
    parts, made = ASIDE[aside]
    stream = stream_of(program(NORMS["scale expanded"], made))
    assert len(stream.online) == parts, stream


def test_a_stream_that_no_linear_layer_reads_is_said_to_be_one() -> None:
    """The norm is taken over all tokens at once: a mathematical reason."""
    over_tokens = program(lambda x, g, b: F.group_norm(x.transpose(1, 2), 1, g, b).transpose(1, 2))
    why = [str(r) for r in spinpass.plan(over_tokens, spinpass.RotationConfig(form="offline")).refusals]
    assert any("linear layers write into the residual stream, and no linear layer can read it rotated: aten::group_norm" in w for w in why)


def operators(editor: ProgramEditor) -> list[str]:
    editor.cleanup()  # of the scales that a norm does not use
    return [op_name(n) for n in editor.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, g, b: x * torch.rsqrt(mean(x * x) + EPS) * g,
        lambda x, g, b: (x - mean(x)) * torch.rsqrt(mean((x - mean(x)) ** 2) + EPS) * g + b,
        lambda x, g, b: (x - 0.5 * mean(x)) * g,
        lambda x, g, b: x / mean(x**3) - mean(x) * g,
        lambda x, g, b: x * torch.rsqrt(mean(x * x) - 0.5 * mean(x) ** 2 + 9),
    ],
    ids=["rms", "centred already", "half the mean", "a third moment", "not a variance"],
)
def test_what_is_spelled_so_already_and_what_keeps_its_mean_stay_as_they_are(norm: Norm) -> None:
    exported = program(norm)
    assert operators(open_program(exported)) == operators(ProgramEditor(exported))


def test_a_wrong_divisor_of_the_variance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_correction", lambda args: 0.0)
    with pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(NORMS["var, unbiased"]), spinpass.RotationConfig(form="offline"))


def test_a_wrong_moment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[c²] taken for E[c²] + 1/10: the mean cancels all the same."""
    real = statistics._mean

    def wrong(value: Polynomial) -> Polynomial | None:
        found = real(value)
        return found + Polynomial.number(0.1) if found is not None and value.by_power(Symbol.CENTRED).get(2) else found

    monkeypatch.setattr(statistics, "_mean", wrong)
    with pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(of_moments), spinpass.RotationConfig(form="offline"))


@pytest.mark.parametrize(("fault", "spelling"), [("_sum", "h + h·g"), ("_product", "scale twice")])
def test_a_wrong_scale_is_noticed(fault: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first operand is lost."""
    monkeypatch.setattr(collect_affine._Collected, fault, lambda self, a, b: b)
    with pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(NORMS[spelling]), spinpass.RotationConfig(form="offline"))


def test_a_scale_of_another_shape_or_dtype_is_left_alone() -> None:
    """Positions are no channels, and 1/g would be rounded to 8 bits."""
    for norm, dtype in (
        (lambda x, g, b: rms(x) * (b[:5, None] * g) * g, torch.float32),
        (lambda x, g, b: rms(x) / g, torch.bfloat16),
    ):
        exported = export(Stream(norm).to(dtype).eval(), (torch.randint(0, 50, (2, 5)),))
        assert operators(open_program(exported)) == operators(ProgramEditor(exported))


def test_polynomials() -> None:
    x, y = Polynomial.of("x"), Polynomial.of("y")
    square = (x + y) * (x + y)
    assert square == x * x + (x * y).scaled(2) + y * y
    assert square.by_power("x") == {2: Polynomial.number(1), 1: y.scaled(2), 0: y * y}
    assert (square + square.scaled(-1)).terms == {}
    assert x.scaled(49).scaled(1 / 49) + x.scaled(-1) == Polynomial({}), "a rounded number cancels"
    assert (x * y).scaled(2).inverse() == (Polynomial.of("x", -1) * Polynomial.of("y", -1)).scaled(0.5)
    assert square.inverse() is None
    assert not Polynomial({}).has("x")


def test_the_form_of_a_layer_norm_is_found_behind_casts() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return wide * 2 - wide.mean(-1, keepdim=True).to(torch.bfloat16) * 2

    editor = ProgramEditor(export(Cast(), (torch.randn(3, H, dtype=torch.bfloat16),)))
    found = Statistics(editor)
    result = [found.of(n) for n in editor.nodes if op_name(n).startswith("aten::")][-1]
    assert result is not None and result.value == Polynomial.of(Symbol.CENTRED).scaled(2)


def of_a_gate(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """A factor for each vector that keeps the last axis, under a deviation that does not."""
    y = x * torch.sigmoid(x[..., :1])
    return (y - mean(y)) / (y.std(-1).unsqueeze(-1) + EPS) * g


def pairs(x: Tensor) -> Tensor:
    r = x[..., :1]
    return (r - r.mT).var(-1, keepdim=True).sum(1, keepdim=True)


def divided(x: Tensor, share: Tensor) -> Tensor:
    """Two statistics without the last axis, each divided by a third one, before they get it back."""
    d = (x * x).mean(-1) + 1
    return ((x * x).mean(-1) / d).unsqueeze(-1) - (x.mean(-1).square() / d).unsqueeze(-1) + share


def rounded_first(x: Tensor) -> Tensor:
    """A rounded copy is centred before the exact one is."""
    z = x.to(torch.bfloat16).to(x.dtype)
    return x * torch.rsqrt(mean(x * x) - mean(x) ** 2 + EPS) + 0 * (z - mean(z))


WIDER = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PER_TOKEN = torch.rand(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
BROADCAST: dict[str, Callable[[Tensor], Tensor]] = {
    "the vector cancels": lambda x: ((x + x.var(-1, keepdim=True)) - x).sum(-1, keepdim=True),
    "a wider summand cancels": lambda x: (x[:1] + WIDER).var(-1, keepdim=True).sum(0, keepdim=True),
    "a wider expansion cancels": lambda x: ((x * x).mean(-1, True)[:1].expand(3, 5, 1) - mean(x[:1]) ** 2).sum(0, True),
    "a wider summand of both": lambda x: ((x[:1] + WIDER) - (mean(x[:1]) + WIDER)).sum(0, True),
    "centred and wider": lambda x: (x[:1] + WIDER - mean(x[:1] + WIDER)).sum(0) * x[:1].var(-1, keepdim=True).sum(0),
    "differences of pairs": pairs,
    "a factor that keeps the axis": lambda x: (x * PER_TOKEN).std(-1).unsqueeze(-1),
    "divided without the axis": lambda x: divided(x, x[..., :1]),
    "rounded first": rounded_first,
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("spelling", BROADCAST)
def test_statistics_that_are_broadcast(spelling: str, batch: int) -> None:
    """As many rows as tokens, and one row: where a wrong broadcast would fit."""
    torch.manual_seed(1)
    made = BROADCAST[spelling]
    model = Stream(lambda x, g, b: F.layer_norm(x, (H,), g, b) + 0.1 * torch.tanh(made(x))).double().eval()
    exported = export(model, (torch.randint(0, 50, (batch, 5)),))
    for form in ("offline", "online"):
        certificate = spinpass.rotate(exported, spinpass.RotationConfig(form=form)).certificate
        assert certificate is not None and certificate.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_under_a_flat_deviation(dtype: torch.dtype) -> None:
    model = Stream(of_a_gate).to(dtype).eval()
    rows = torch.export.Dim("rows", max=9)
    exported = export(model, (torch.randint(0, 50, (2, 5)),), dynamic_shapes=({0: rows},))
    assert spinpass.rotate(exported, spinpass.RotationConfig(form="offline")).certificate.ok  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_divisor_in_another_dtype_is_not_rounded(dtype: torch.dtype) -> None:
    """Its inverse would have its 8 or 11 bits."""
    exported = program(lambda x, g, b: rms(x) / g.to(dtype).clone())
    for form in ("offline", "online"):
        assert spinpass.rotate(exported, spinpass.RotationConfig(form=form)).certificate.ok  # type: ignore[union-attr]


@pytest.mark.parametrize("narrow", ["the vector", "the mean"])
def test_a_mean_of_another_dtype(narrow: str) -> None:
    def norm(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        c = x.float() - mean(x) if narrow == "the vector" else x - mean(x.double())
        return (c * torch.rsqrt(mean(c**2) + EPS)).to(x.dtype) * g + b

    model = Stream(norm).to(torch.float64 if narrow == "the vector" else torch.float32).eval()
    exported = export(model, (torch.randint(0, 50, (2, 5)),))
    assert spinpass.rotate(exported, spinpass.RotationConfig(form="offline")).certificate.ok  # type: ignore[union-attr]

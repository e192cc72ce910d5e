"""The certificate must pass what is equal and fail what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind

from spinpass import record
from spinpass.certificate.certificate import Difference, difference_of
from spinpass.certificate.programs import run, verify
from spinpass.errors import ConfigError, ProgramError, VerificationError
from spinpass.execution import synthetic
from spinpass.execution.interpreter import execute, flat_inputs
from spinpass.execution.synthetic import InputRole, synthetic_inputs, user_inputs
from spinpass.record import Carried, Record
from spinpass.rotations.rotation import Rotation
from tests.support import modules


def exported(module: nn.Module, *args: Any, **options: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), args, **options)


# -- equal programs pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_decomposed_program_is_equivalent(dtype: torch.dtype) -> None:
    ep = modules.export(dtype=dtype, norm="layer", bias="all")
    certificate = verify(ep, ep.run_decompositions())
    assert certificate.ok, str(certificate)
    assert certificate.dtype == (
        torch.float32 if dtype is torch.float64 else dtype
    )  # RoPE and norms compute in float32
    assert certificate.outputs[0].float64.relative < 1e-13
    assert certificate.outputs[0].float64.argmax == 1.0
    certificate.raise_if_failed()


def test_certificate_prints_and_serialises() -> None:
    ep = modules.export(cache=True, dynamic=True)
    certificate = verify(ep, ep)
    text = str(certificate)
    assert text.startswith("equivalent: relative error at most 0.0e+00 in float64")
    assert "output 0 (" in text and "2 further steps" in text and "ids int64[2, 5]" in text
    data = json.loads(json.dumps(certificate.to_dict()))
    assert data["ok"] and data["closed_loop_steps"] == 2 and data["dtype"] == "float32"
    assert data["outputs"][0]["shape"] == [2, 5, 96]


def test_outputs_are_named_by_their_path() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": x + 1, "caches": [x * 2, x * 3]}

    ep = exported(Named(), torch.randn(2, 3))
    assert [o.name for o in verify(ep, ep).outputs] == ["logits", "caches.0", "caches.1"]


def test_neither_program_nor_inputs_are_modified() -> None:
    ep = exported(Writer(), torch.randn(2, 3))
    x = torch.randn(2, 3)
    given, stored = x.clone(), ep.state_dict["total"].clone()
    verify(ep, ep, (x,))
    assert torch.equal(x, given) and torch.equal(ep.state_dict["total"], stored)


def test_progress_reaches_its_total() -> None:
    ep = modules.export(layers=1)
    seen: list[tuple[int, int]] = []
    verify(ep, ep, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- different programs fail -----------------------------------------------------------------------------------------


def failing(before: ExportedProgram, after: ExportedProgram, match: str, **options: Any) -> None:
    certificate = verify(before, after, **options)
    assert not certificate.ok
    assert certificate.verdict.startswith("NOT equivalent: ")
    assert "FAIL" in str(certificate)
    with pytest.raises(VerificationError, match=match):
        certificate.raise_if_failed()


def test_perturbed_weight_fails() -> None:
    model, changed = (modules.decoder(dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        changed.layers[1].mlp.down.weight[3, 5] += 1e-7
    args = modules.sample_args(model.options)
    before, after = modules.export_module(model, args), modules.export_module(changed, args)
    failing(before, after, "relative error .* in float64, bound 1.0e-09")


def test_rounding_of_stored_constants_is_told_from_the_transformation() -> None:
    """float32 weights that were multiplied and stored again: exact before the rounding, one roundoff off as stored."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter((torch.randn(8, 16).double() * factor).float())
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) / self.factor

    x = torch.randn(2, 16)
    before, after = exported(Scaled(1.0), x), exported(Scaled(3.0), x)
    as_stored = verify(before, after)
    assert as_stored.ok and 1e-9 < as_stored.outputs[0].float64.relative < as_stored.outputs[0].bound64 < 1e-6
    assert as_stored.constants == "the changed constants as stored, rounded to float32"
    calls = []

    def exact() -> Tensor:
        calls.append(1)
        return before.state_dict["weight"].double() * 3.0

    certificate = verify(before, after, exact={"p_weight": exact})
    assert certificate.ok and certificate.outputs[0].float64.relative < 1e-15 and calls
    assert certificate.outputs[0].bound64 == 1e-9
    assert certificate.constants == "the changed constants before their final rounding"
    assert verify(before, before).constants == "no constant was rounded again"
    failing(before, after, "in float64, bound 1.0e-09", exact={"p_weight": lambda: exact() * (1 + 1e-8)})
    failing(before, after, "in float64, bound 1.0e-09", bound=1e-9)
    with pytest.raises(ConfigError, match="exact values for nothing: the program has no such constants"):
        verify(before, after, exact={"nothing": exact})


def test_dropped_bias_fails() -> None:
    model, without = modules.decoder(bias="v"), modules.decoder(bias="v")
    nn.init.zeros_(without.layers[0].attention.v.bias)
    args = modules.sample_args(model.options)
    failing(
        modules.export_module(model, args), modules.export_module(without, args), "not equivalent: output .* in float64"
    )


def test_swapped_outputs_fail() -> None:
    class Pair(nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            self.swap = swap

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x.sin(), x.cos()) if self.swap else (x.cos(), x.sin())

    x = torch.randn(2, 3)
    failing(exported(Pair(False), x), exported(Pair(True), x), r"2 of 2 outputs fail")


def test_wrong_rotation_fails_and_the_right_one_passes() -> None:
    class Stream(nn.Module):
        """x → norm without scale → linear, the stream in basis R from the embedding to the reader."""

        def __init__(self, write: Tensor, read: Tensor) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(20, 16) @ write)
            self.head = nn.Parameter(torch.randn(9, 16) @ read)

        def forward(self, ids: Tensor) -> Tensor:
            x = F.embedding(ids, self.table)
            return F.linear(F.rms_norm(x, (16,)), self.head)

    right = Rotation.create("random-hadamard", 16, seed=1).matrix(torch.float32)
    wrong = Rotation.create("random-hadamard", 16, seed=2).matrix(torch.float32)
    ids = torch.randint(0, 20, (2, 5))
    before = exported(Stream(torch.eye(16), torch.eye(16)), ids)
    assert verify(before, exported(Stream(right, right), ids)).ok
    failing(before, exported(Stream(right, wrong), ids), "in float64")


def test_native_bound_catches_what_float64_does_not() -> None:
    class Cancelling(nn.Module):
        def __init__(self, big: float) -> None:
            super().__init__()
            self.big = nn.Parameter(torch.tensor(big))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.big) - self.big

    x = torch.randn(2, 3)
    certificate = verify(exported(Cancelling(0.0), x), exported(Cancelling(65536.0), x), bound=1e-9)
    assert certificate.outputs[0].float64.relative < 1e-9
    assert "in the model's dtype, bound 2.0e-04" in certificate.verdict


def test_shape_and_dtype_must_be_kept() -> None:
    class Shaped(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Tensor) -> Tensor:
            return {"same": x * 1, "flat": x.flatten() * 1, "wide": x.double() * 1}[self.how]

    x = torch.randn(2, 3)
    before = exported(Shaped("same"), x)
    failing(before, exported(Shaped("flat"), x), r"shape \[6\] instead of \[2, 3\]")
    failing(before, exported(Shaped("wide"), x), "dtype torch.float64 instead of torch.float32")


def test_integer_outputs_must_be_equal() -> None:
    class Count(nn.Module):
        def __init__(self, more: int) -> None:
            super().__init__()
            self.more = more

        def forward(self, x: Tensor) -> Tensor:
            return x + self.more

    x = torch.tensor([[10**12, 3]])
    failing(exported(Count(0), x), exported(Count(1), x), "in float64, bound 0.0e", inputs=(x,))


def test_nonfinite_values_must_agree() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    assert difference_of(a, a.clone(), argmax=False).error == 0
    assert difference_of(a, torch.tensor([1.0, 1.0, float("inf"), float("-inf")]), argmax=False).relative == float("inf")
    assert difference_of(a, -a, argmax=False).relative == float("inf")


def test_zero_reference_is_not_divided_by() -> None:
    assert Difference(1e-20, 0.0, None).relative == float("inf")
    assert Difference(0.0, 0.0, None).relative == 0.0


# -- float64 really is float64 ---------------------------------------------------------------------------------------


class Casting(nn.Module):
    """Every way in which a program asks for float32 by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("phase", torch.randn(8), persistent=False)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-6)
        steps = (
            torch.arange(8, dtype=torch.float32) / 3 + torch.full((8,), 0.1) + torch.full((), 0.2, dtype=torch.float32)
        )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            angle = (normed.float() * self.phase + steps).half().sin()
        weights = F.softmax(angle, -1, dtype=torch.float32).type_as(x)
        spectrum = torch.view_as_real(torch.polar(wide.abs(), angle.float()))
        return weights * self.scale, spectrum, ids * 0.1, ids / 3, torch.ones(3) / 3


def test_lifted_run_rounds_nothing_to_float32() -> None:
    x, ids = torch.randn(2, 8), torch.arange(3)
    ep = exported(Casting(), x, ids)
    lifted = run(ep, (x, ids), float64=True)
    assert [t.dtype for t in lifted] == [torch.float64] * 5
    wide, scale, phase = x.double(), ep.state_dict["scale"].double(), ep.constants["phase"].double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    angle = (normed * phase + torch.arange(8, dtype=torch.float64) / 3 + 0.1 + 0.2).sin()
    spectrum = torch.view_as_real(torch.polar(wide.abs(), angle))
    expected = (F.softmax(angle, -1) * scale, spectrum, ids * torch.tensor(0.1, dtype=torch.float64), ids.double() / 3,
                torch.ones(3, dtype=torch.float64) / 3)  # fmt: skip
    for result, reference in zip(lifted, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-14, atol=1e-15)
    assert torch.get_default_dtype() is torch.float32


def test_cast_to_float32_inside_a_norm_does_not_limit_the_error() -> None:
    """Two spellings of one norm, one of which casts: equal to 1e-15 when lifted, only to 1e-7 when run as they are."""

    class Spelling(nn.Module):
        def __init__(self, cast: bool) -> None:
            super().__init__()
            self.cast = cast

        def forward(self, x: Tensor) -> Tensor:
            y = x.float() if self.cast else x
            return (y / y.pow(2).mean(-1, keepdim=True).sqrt()).to(x.dtype)

    x = torch.randn(4, 64, dtype=torch.float64)
    check = verify(exported(Spelling(True), x), exported(Spelling(False), x), bound={torch.float64: 1e-9}).outputs[0]
    assert check.float64.relative < 1e-15
    assert 1e-9 < check.native.relative < 1e-6
    assert check.noise > 1e-9


def test_constants_are_lifted_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float64 copy of a weight outlives the node that reads it."""
    import weakref

    from spinpass.execution import interpreter as execution

    ep = modules.export(layers=3)
    weights = {id(t) for t in ep.state_dict.values()}
    alive: list[weakref.ref[Tensor]] = []
    peak, original = 0, execution.lift

    def spy(value: Any) -> Any:
        nonlocal peak
        result = original(value)
        if id(value) in weights:
            alive.append(weakref.ref(result))
            peak = max(peak, sum(r() is not None for r in alive))
        return result

    monkeypatch.setattr(execution, "lift", spy)
    run(ep, synthetic_inputs(ep), float64=True)
    assert len(alive) > 20 and peak <= 2


def test_subgraphs_are_lifted() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.float().exp(), lambda t: t.float().sin(), (x,))

    x = torch.rand(4, 8)
    lifted = run(exported(Branching(), x), (x,), float64=True)[0]
    torch.testing.assert_close(lifted, x.double().exp(), rtol=1e-15, atol=0)


# -- state: in-place writes, buffers, caches -------------------------------------------------------------------------


class Writer(nn.Module):
    """Writes into a buffer and into its input."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("total", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x, alpha=self.rate)
        x.mul_(2)
        return self.total.sum() * x.cos()


def test_written_buffers_and_inputs_are_outputs_too() -> None:
    x = torch.randn(2, 3)
    ep = exported(Writer(), x)
    certificate = verify(ep, ep.run_decompositions({}))  # in-place there, functional here
    assert certificate.ok, str(certificate)
    assert [o.name for o in certificate.outputs][1:] == ["state b_total", "state x"]
    assert certificate.closed_loop_steps == 2
    failing(ep, exported(Writer(0.5), x), "in float64")


def test_state_that_only_one_program_writes_fails() -> None:
    class Silent(Writer):
        def forward(self, x: Tensor) -> Tensor:
            total = self.total + x
            x.mul_(2)
            return total.sum() * x.cos()

    x = torch.randn(2, 3)
    failing(exported(Writer(), x), exported(Silent(), x), "state b_total", steps=0)


class Cached(nn.Module):
    """A value cache in basis `read` on the way in and `write` on the way out."""

    def __init__(self, read: Tensor | None = None, write: Tensor | None = None, static: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)
        self.double()
        self.static = static
        self.read, self.write = read, write

    def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        v = self.value(x)
        v = v if self.write is None else v @ self.write
        joined = cache.index_copy(1, at, v) if self.static else torch.cat([cache, v], 1)
        seen = joined.cumsum(1)[:, -x.shape[1] :]
        return self.head(seen if self.read is None else seen @ self.read.T), joined


def cached(
    read: Rotation | None, write: Rotation | None, *, static: bool = False, dynamic: bool = True
) -> ExportedProgram:
    """A :class:`Cached` program with its record: inputs in basis `read`, outputs in basis `read` as it says."""
    matrices = [None if r is None else r.matrix() for r in (read, write)]
    args = (torch.randn(2, 3, 16).double(), torch.randn(2, 9, 16).double(), torch.arange(3))
    shapes = ({1: Dim.AUTO}, {1: Dim.AUTO}, {0: Dim.AUTO}) if dynamic and not static else None
    ep = exported(Cached(*matrices, static=static), *args, dynamic_shapes=shapes)
    if read is not None:
        record.write(ep.graph, Record("1", {"cache": Carried(read, -1, "v")}, {1: Carried(read, -1, "v")}))
    return ep


def rotation(seed: int) -> Rotation:
    return Rotation.create("random-hadamard", 16, seed=seed)


@pytest.mark.parametrize("static", [False, True])
def test_rotated_cache_passes_with_its_record(static: bool) -> None:
    certificate = verify(cached(None, None, static=static), cached(rotation(1), rotation(1), static=static))
    assert certificate.ok, str(certificate)
    assert certificate.closed_loop_steps == 2
    assert "each program fed the 1 tensors it returned itself" in certificate.closed_loop


def test_rotated_cache_fails_without_its_record() -> None:
    after = cached(rotation(1), rotation(1))
    for node in after.graph.nodes:
        node.meta.pop("custom", None)
    failing(cached(None, None), after, "in float64")


def test_closed_loop_catches_a_cache_carried_in_the_wrong_basis() -> None:
    """Reads basis 1, writes basis 2, and the record admits it: every single step looks right, the second is wrong."""
    one, two = rotation(1), rotation(2)

    class TwoBases(Cached):
        def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            v = self.value(x)
            seen = torch.cat([cache @ self.read.T, v], 1).cumsum(1)[:, -x.shape[1] :]
            return self.head(seen), torch.cat([cache @ self.read.T, v], 1) @ self.write

    args = (torch.randn(2, 3, 16).double(), torch.randn(2, 9, 16).double(), torch.arange(3))
    shapes = ({1: Dim.AUTO}, {1: Dim.AUTO}, {0: Dim.AUTO})
    after = exported(TwoBases(one.matrix(), two.matrix()), *args, dynamic_shapes=shapes)
    record.write(after.graph, Record("1", {"cache": Carried(one, -1, "v")}, {1: Carried(two, -1, "v")}))
    assert verify(cached(None, None), after, steps=0).ok
    failing(cached(None, None), after, "in float64")


def test_closed_loop_says_why_it_stops() -> None:
    static = cached(None, None, dynamic=False)
    certificate = verify(static, static)
    assert certificate.closed_loop_steps == 0
    assert certificate.closed_loop == (
        "0 further steps, then stopped: cache was returned as [2, 12, 16] but is taken as [2, 9, 16]"
    )
    full = cached(None, None, static=True)
    certificate = verify(full, full, steps=5)
    assert certificate.closed_loop_steps == 2
    assert certificate.closed_loop.endswith("stopped: at would pass the end of a cache of 9 places")
    plain = modules.export(layers=1)
    assert verify(plain, plain).closed_loop == "none: the program returns no state that it also takes"


def test_heads_side_by_side_are_rotated_block_by_block() -> None:
    """An axis of two heads of 8, both in the basis of one rotation of size 8."""
    r = Rotation.create("random-hadamard", 8, seed=3)
    blocks = torch.block_diag(r.matrix(), r.matrix())
    args = (torch.randn(2, 3, 16).double(), torch.randn(2, 9, 16).double(), torch.arange(3))
    after = exported(Cached(blocks, blocks), *args)
    record.write(after.graph, Record("1", {"cache": Carried(r, -1, "v")}, {1: Carried(r, -1, "v")}))
    assert verify(cached(None, None, dynamic=False), after).ok


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_exported_generation_graphs(name: str) -> None:
    """The cache of the exporter's graphs, growing or of fixed size, is found and fed back."""
    pytest.importorskip("transformers")
    from tests.support import models

    for graph in (
        models.export_hf_cache(models.build(name)),
        models.export_hf_generation(models.build(name), static=True)["decode"],
    ):
        assert isinstance(graph, ExportedProgram)
        certificate = verify(graph, graph.run_decompositions({}))
        assert certificate.ok, str(certificate)
        assert certificate.closed_loop_steps == 2
        assert certificate.outputs[0].name == "logits" and certificate.outputs[0].float64.argmax == 1.0
        assert certificate.outputs[1].name.startswith(f"{models.cache_argument()}.")
        assert certificate.outputs[1].float64.argmax is None


def test_prefill_then_decode_share_a_cache() -> None:
    pytest.importorskip("transformers")
    from tests.support import models

    model = models.build("llama", dtype=torch.float64)
    graphs = models.export_hf_generation(model)
    logits = models.prefill_then_decode(graphs["prefill"], graphs["decode"], steps=2)
    ids = models.sample_inputs(mask=False)["input_ids"]
    with torch.no_grad():
        whole = model(torch.cat([ids, models.next_ids(2)], 1), use_cache=False).logits
    torch.testing.assert_close(torch.cat([logits[0][:, -1:], *logits[1:]], 1), whole[:, -3:], rtol=0, atol=1e-5)


# -- inputs ----------------------------------------------------------------------------------------------------------


class Roles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.small = nn.Embedding(50, 8), nn.Embedding(7, 8)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, at: Tensor, cache: Tensor, seen: Tensor) -> Tensor:
        x = self.table(ids) + self.small(ids.view(ids.shape)) + positions.unsqueeze(-1).float() * torch.ones(8)
        written = cache.index_copy(1, at, x)
        bias = torch.zeros(mask.shape).masked_fill(mask.to(torch.bool).logical_not(), -1e9)
        return (written.sum((1, 2)) + bias.exp().sum(1)) * seen.sum()


def roles_program(dynamic: bool) -> ExportedProgram:
    args = (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 9, dtype=torch.long), torch.arange(4)[None].repeat(2, 1),
            torch.arange(4), torch.zeros(2, 9, 8), torch.ones(2, dtype=torch.bool))  # fmt: skip
    shapes = tuple(dict.fromkeys(range(a.ndim), Dim.AUTO) for a in args) if dynamic else None
    return exported(Roles(), *args, dynamic_shapes=shapes)


def test_integer_inputs_follow_their_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_LARGE", 0)  # as if the example inputs were too long
    ep = roles_program(dynamic=True)
    roles = {i.name: (i.role, i.bound) for i in user_inputs(ep)}
    assert roles["ids"] == (InputRole.LOOKUP, 7)
    assert roles["mask"][0] is InputRole.MASK
    assert roles["positions"] == (InputRole.POSITION, None)
    assert roles["at"][0] is InputRole.POSITION
    values = synthetic_inputs(ep)
    assert int(values["ids"].max()) < 7 and values["ids"].shape[0] == 2
    assert torch.equal(values["mask"], torch.ones_like(values["mask"]))
    assert values["positions"][0].tolist() == list(range(values["ids"].shape[1])) == values["at"].tolist()
    assert values["cache"].std() > 0.5
    assert verify(ep, ep).ok


def test_example_inputs_are_used_except_for_blank_floats() -> None:
    values = synthetic_inputs(roles_program(dynamic=False))
    assert torch.equal(values["ids"], torch.ones(2, 4, dtype=torch.long))
    assert values["cache"].std() > 0.5
    again = synthetic_inputs(roles_program(dynamic=False))
    assert torch.equal(values["cache"], again["cache"])


def test_dependent_sizes_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, cache: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            joined = torch.cat([cache, x], 1)
            return joined * mask.unsqueeze(-1).to(torch.bool), joined

    monkeypatch.setattr(synthetic, "_LARGE", 0)
    axes = {0: Dim.AUTO, 1: Dim.AUTO}
    args = (torch.randn(2, 10, 4), torch.randn(2, 20, 4), torch.ones(2, 30, dtype=torch.long))
    ep = exported(Masked(), *args, dynamic_shapes=(axes, axes, axes))
    values = synthetic_inputs(ep)
    assert values["mask"].shape[1] == values["x"].shape[1] + values["cache"].shape[1] < 30
    certificate = verify(ep, ep)
    assert certificate.ok and certificate.closed_loop_steps == 2  # the mask grew with the cache


def test_symbolic_and_constant_numbers() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor, n: int, scale: float, unused: None = None) -> Any:
            return x * n * scale, n

    ep = exported(Counted(), torch.randn(2, 3), 3, 0.5, None, dynamic_shapes=(None, Dim.DYNAMIC, None, None))
    values = synthetic_inputs(ep)
    assert values["n"] == 3 and values["scale"] == 0.5
    x = torch.randn(2, 3)
    results = run(ep, (x, 5, 0.5, None))
    torch.testing.assert_close(results[0], x * 2.5)
    assert results[1] == 5
    assert verify(ep, ep).ok


def test_inputs_in_every_form() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    with torch.no_grad():
        ep = torch.export.export(Sum(), (a,), {"b": b})
    for inputs in (((a,), {"b": b}), {"a": a, "b": b}):
        assert torch.equal(run(ep, inputs)[0], a - b)
    with pytest.raises(ConfigError, match="the inputs do not fit the program, which takes a, b"):
        flat_inputs(ep, (a,))
    with pytest.raises(ConfigError, match="inputs must be a tuple of arguments or a mapping of names, got Tensor"):
        flat_inputs(ep, a)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_types_and_bounds() -> None:
    ep = modules.export(layers=1)
    with pytest.raises(ProgramError, match=r"verify compares two torch.export.ExportedProgram, got Decoder"):
        verify(ep, modules.decoder())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bound -1 for torch.float64: bounds are numbers >= 0"):
        verify(ep, ep, bound=-1)
    with pytest.raises(ConfigError, match="bound 1.0 for torch.int8"):
        verify(ep, ep, bound={torch.int8: 1.0})


def test_different_signatures() -> None:
    plain, with_cache = modules.export(layers=1), modules.export(layers=1, cache=True)
    with pytest.raises(VerificationError, match="the programs take different inputs: ids and ids, positions"):
        verify(plain, with_cache)
    with pytest.raises(VerificationError, match="the programs return different numbers of outputs: 1 and 2"):
        verify(plain, modules.export(layers=1, value_head=True))


def test_failing_node_is_named() -> None:
    ep = exported(nn.Embedding(5, 3), torch.tensor([[1, 2]]))
    with pytest.raises(
        ProgramError, match=r"node embedding \(aten.embedding.default\) could not be run lifted to float64"
    ):
        run(ep, (torch.tensor([[9, 9]]),), float64=True)


def test_missing_values() -> None:
    ep = modules.export(layers=1)
    with pytest.raises(ProgramError, match=r"no value for input ids \(user_input\)"):
        execute(ep, {})
    del ep.state_dict["head.weight"]
    with pytest.raises(
        ProgramError, match="placeholder p_head_weight names the constant head.weight, which the program lacks"
    ):
        run(ep, synthetic_inputs(ep))


def test_training_outputs_are_refused() -> None:
    ep = modules.export(layers=1)
    ep.graph_signature.output_specs[0].kind = OutputKind.LOSS_OUTPUT
    with pytest.raises(ProgramError, match="of kind LOSS_OUTPUT is not supported: export for inference"):
        run(ep, synthetic_inputs(ep))


def test_sizes_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ratio(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.view(2, -1, 3).sum() + y.sum()

    ep = exported(Ratio(), torch.randn(12, 4), torch.randn(5), dynamic_shapes=({0: 6 * Dim("n")}, {0: Dim("m")}))
    values = synthetic_inputs(ep)
    assert values["x"].shape[0] % 6 == 0
    symbol = next(iter(ep.range_constraints))
    with pytest.raises(ConfigError, match="size .* cannot be derived from the other input sizes"):
        synthetic.concrete(symbol, {})
    monkeypatch.setattr(synthetic, "_LARGE", 0)
    monkeypatch.setattr(synthetic, "out_of_range", lambda ep, sizes: "s0 = 1 is outside 2..3")
    with pytest.raises(
        ConfigError, match="no small input sizes found: s0 = 1 is outside 2..3; give the inputs explicitly"
    ):
        synthetic_inputs(ep)


def test_forbidden_entries_do_not_hide_an_error() -> None:
    """A mask of finfo.min in the output is no scale that its other entries could be measured by."""
    reference = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min]])
    found = difference_of(reference, reference + torch.tensor([[0.0, 0.5, 0.0]]), argmax=False)
    assert found.scale == 2.0 and found.error == 0.5
    assert difference_of(reference, torch.zeros_like(reference), argmax=False).scale > 1e38

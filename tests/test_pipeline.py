"""The whole pass on tiny models: the same function, whatever the model, the form, the exporter and the dtype."""

from __future__ import annotations

import copy
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

import spinpass
from spinpass import RotationConfig, record
from spinpass.certificate.programs import run, synthetic_inputs
from spinpass.config import ROLES
from spinpass.errors import ConfigError, ProgramError, QuantizedWeightError, RefusedError, VerificationError
from spinpass.passes import open_program
from spinpass.planning import Planner, UntieRequest
from spinpass.rotations.rotation import Rotation
from tests.support import models
from tests.support.decoders import Decoder, exported, flat, made, outcome, relative_error, snapshot, tokens
from tests.support.programs import program
from tests.support.sweeps import quick

EXACT = 1e-9
SANDWICH = {"gemma2", "gemma3_text"}  # norms on both sides of a block
POST = {"olmo2"}  # norms behind a block only
TIED = {
    "llama_tied",
    "qwen2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "falcon",
    "falcon_new",
    "falcon_alibi",
    "starcoder2",
    "cohere",
    "bloom",
}
CLOSED = [n for n in models.DECODERS if n not in SANDWICH | POST | {"bloom"}]  # offline R1 without online parts


def config(**settings: object) -> RotationConfig:
    return RotationConfig(**{"verify": False, **settings})  # type: ignore[arg-type]


def error(before: ExportedProgram, after: ExportedProgram, seed: int = 0) -> float:
    """The largest relative error of any output in float64 throughout, run apart from the certificate. Only for programs whose
    cache stays in its basis."""
    inputs = synthetic_inputs(before, seed=seed)
    return relative_error(run(before, inputs, float64=True), run(after, inputs, float64=True))


def transformed(before: ExportedProgram, **settings: object) -> ExportedProgram:
    """Transform, and check that the input is bit for bit what it was."""
    was = snapshot(before)
    after = spinpass.transform(before, config(**settings))
    assert snapshot(before) == was
    return after


def counts(plan: spinpass.RotationPlan) -> dict[str, int]:
    return {role: sum(s.role == role for s in plan.spaces) for role in ROLES}


# -- every model, every form -------------------------------------------------------------------------------------------------


FORMS = quick(
    itertools.product(("offline", "online", "auto"), ("keep", "untie")), only=[("offline", "untie"), ("online", "keep"), ("auto", "keep")]
)


@pytest.mark.parametrize(("form", "tied"), FORMS)
@pytest.mark.parametrize("name", models.DECODERS)
def test_every_model_is_exact_in_every_form(name: str, form: str, tied: str) -> None:
    before = program(name)
    after = transformed(before, form=form, tied=tied)
    assert error(before, after) <= EXACT
    found = counts(spinpass.plan(before, config(form=form, tied=tied)))
    assert found["R1"] >= 1
    assert {role: found[role] for role in ("R2", "R3", "R4")} == {"R2": 2, "R3": 2, "R4": 2}


@pytest.mark.parametrize("name", CLOSED)
def test_pre_norm_models_take_the_offline_form_and_need_nothing_online_but_at_a_tied_table(name: str) -> None:
    before = program(name)
    for tied, ends in (("untie", 0), ("keep", 2 if name in TIED else 0)):
        plan = spinpass.plan(before, config(rotations="R1", form="auto", tied=tied))
        assert [s.form for s in plan.spaces] == ["offline"], str(plan)
        assert len(plan.spaces[0].online) <= ends, str(plan)


@pytest.mark.parametrize("name", sorted(SANDWICH | POST))
def test_post_norm_models_take_the_online_form_and_the_plan_says_why(name: str) -> None:
    plan = spinpass.plan(program(name), config(rotations="R1"))
    assert {s.form for s in plan.spaces} == {"online"}
    assert any(r.what == "R1 offline" and "online parts" in r.why for r in plan.refusals)


QUICK = ("llama_bias", "gpt2", "falcon_new")
SWEEP = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in models.DECODERS]


@pytest.mark.parametrize("how", ["dynamic", "functional", "decomposed"])
@pytest.mark.parametrize("name", SWEEP)
def test_dynamic_and_decomposed_programs_are_exact(name: str, how: str) -> None:
    before = program(name, how)
    for form in ("offline", "online"):
        after = transformed(before, form=form)
        assert error(before, after) <= EXACT
        assert str(before.range_constraints) == str(after.range_constraints)
    plain = counts(spinpass.plan(program(name), config(form="offline")))
    assert counts(spinpass.plan(before, config(form="offline"))) == plain


@pytest.mark.parametrize("name", ["llama_bias", "phi3", "gpt2", "gpt_neox", "gemma", "olmo2"])
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("form", ["offline", "online"])
def test_every_kind_of_rotation(name: str, kind: str, form: str) -> None:
    before = program(name)
    after = transformed(before, kind=kind, form=form, seed=0 if kind == "hadamard" else 5)
    new = [v.dtype for k, v in after.state_dict.items() if k not in before.state_dict]
    assert error(before, after) <= (
        1e-7 if torch.float32 in new else EXACT
    )  # a dense matrix for a value that is float32


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_block_sizes(kind: str, block: int) -> None:
    before = program("llama_bias")
    if block == 1:  # a diagonal of signs rotates nothing
        with pytest.raises(RefusedError, match="nothing was rotated"):
            transformed(before, kind=kind, block_size=block)
        return
    after = transformed(before, kind=kind, block_size=block, form="offline")
    assert error(before, after) <= EXACT
    assert {s.rotation.order for s in spinpass.plan(before, config(kind=kind, block_size=block)).spaces} == {block}


def test_a_block_size_that_does_not_divide_names_the_space_and_the_sizes() -> None:
    with pytest.raises(ConfigError, match=r"R1:residual.*5.*48|R1:residual.*48.*5"):
        spinpass.plan(program("llama"), config(block_size=5))


PAPER = ROLES[:4]


@pytest.mark.parametrize("roles", [c for n in range(1, 5) for c in itertools.combinations(PAPER, n)], ids="".join)
def test_every_subset_of_rotations(roles: tuple[str, ...]) -> None:
    before = program("qwen2")
    after = transformed(before, rotations=roles)
    assert error(before, after) <= EXACT
    found = record.read(after)
    assert found is not None
    assert {name.split(":")[0] for name in found.rotations} == set(roles)


def test_matrices_of_the_user() -> None:
    generator = torch.Generator().manual_seed(0)
    orthogonal = {
        n: torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (48, 16, 80)
    }
    before = program("llama_bias")
    given = {
        "R1": orthogonal[48].float(),
        "R2": orthogonal[16],
        "R3:*layers.1*": orthogonal[16].T.contiguous(),
        "R4": orthogonal[80],
    }
    after = transformed(before, matrices=given, form="offline")
    assert error(before, after) <= EXACT
    plan = spinpass.plan(before, config(matrices=given, form="offline"))
    kinds = {s.name: s.rotation.kind for s in plan.spaces}
    assert kinds["R1:residual"] == "learned"
    assert sorted(k for n, k in kinds.items() if n.startswith("R3")) == ["hadamard", "learned"]


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        (torch.eye(24, dtype=torch.float64), r"R1:residual.*24×24.*size 48"),
        (torch.ones(48, 48, dtype=torch.float64), "has no inverse"),
        (torch.diag(torch.arange(1.0, 49.0, dtype=torch.float64)), "orthogonal"),
        (torch.eye(48, dtype=torch.int64), "int64"),
        (torch.full((48,), 2.0, dtype=torch.float64), "R1:residual"),
    ],
)
def test_matrices_that_do_not_fit(matrix: Tensor, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        spinpass.transform(program("llama"), config(matrices={"R1": matrix}))


# -- dtypes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gemma"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
@pytest.mark.parametrize("form", ["offline", "online"])
def test_narrow_dtypes_keep_their_dtypes_and_pass_the_certificate(name: str, dtype: torch.dtype, form: str) -> None:
    before = program(name, "dynamic", dtype)
    after = transformed(before, form=form, kind="random-hadamard")
    assert {k: v.dtype for k, v in after.state_dict.items() if k in before.state_dict} == {
        k: v.dtype for k, v in before.state_dict.items()
    }
    assert all(v.dtype in (dtype, torch.float32) for k, v in after.state_dict.items() if k not in before.state_dict)
    certificate = spinpass.verify(before, after)
    assert certificate.ok, str(certificate)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_constants_are_rounded_once(dtype: torch.dtype) -> None:
    """Every constant of the rotated program is the float64 result, cast: the same as rotating the lifted model."""
    narrow = exported(made(Decoder(norm="ln", bias=True), dtype=dtype))
    wide = exported(made(Decoder(norm="ln", bias=True), dtype=dtype).to(torch.float64))
    a, b = (transformed(p, form="offline").state_dict for p in (narrow, wide))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name].to(dtype), rtol=0, atol=0, msg=name)


# -- what must stay as it was ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "falcon_new", "gemma3_text"])
def test_names_shapes_dtypes_and_the_call_signature_are_kept(name: str) -> None:
    before = program(name, "dynamic")
    for tied in ("keep", "untie"):
        after = transformed(before, form="offline", tied=tied)
        assert user_inputs(before) == user_inputs(after)
        assert [s.arg.name for s in after.graph_signature.input_specs] == [
            n.name for n in after.graph.nodes if n.op == "placeholder"
        ]
        assert str(before.call_spec) == str(after.call_spec)
        assert (
            before.example_inputs is after.example_inputs
            or relative_error(before.example_inputs, after.example_inputs) == 0
        )
        assert [shape_of(n) for n in outputs(before)] == [shape_of(n) for n in outputs(after)]
        old = {k: (v.shape, v.dtype, v.requires_grad, type(v)) for k, v in before.state_dict.items()}
        new = {k: (v.shape, v.dtype, v.requires_grad, type(v)) for k, v in after.state_dict.items()}
        assert old.items() <= new.items()


def user_inputs(ep: ExportedProgram) -> list[tuple[str, str]]:
    nodes = {n.name: n for n in ep.graph.nodes}
    return [
        (s.arg.name, str(getattr(nodes[s.arg.name].meta.get("val"), "shape", None)))
        for s in ep.graph_signature.input_specs
        if s.kind is InputKind.USER_INPUT
    ]


def outputs(ep: ExportedProgram) -> list[torch.fx.Node]:
    return list(next(iter(reversed(ep.graph.nodes))).args[0])  # type: ignore[arg-type]


def shape_of(node: torch.fx.Node) -> tuple[str, torch.dtype]:
    return str(node.meta["val"].shape), node.meta["val"].dtype


def test_the_fake_value_of_every_node_is_what_the_node_computes() -> None:
    class Checked(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert (tuple(result.shape), result.dtype) == (tuple(n.meta["val"].shape), n.meta["val"].dtype), n
                if n.op == "call_function":
                    assert result.stride() == n.meta["val"].stride(), n
            return result

    for kind in ("random-hadamard", "random-matrix"):
        for form in ("offline", "online"):
            after = transformed(program("gemma2"), kind=kind, form=form, block_size=8)
            store = {**after.state_dict, **after.constants}
            given = synthetic_inputs(after)
            feed = [
                given[s.arg.name] if s.kind is InputKind.USER_INPUT else store[s.target]
                for s in after.graph_signature.input_specs
            ]
            with torch.no_grad():
                Checked(after.graph_module).run(*feed, enable_io_processing=False)


def test_parameters_are_not_shared_with_the_input_where_they_changed() -> None:
    before = program("llama_bias")
    after = transformed(before)
    changed = {k for k in before.state_dict if not torch.equal(before.state_dict[k], after.state_dict[k])}
    assert "model.layers.0.self_attn.v_proj.bias" in changed
    assert all(before.state_dict[k].data_ptr() != after.state_dict[k].data_ptr() for k in changed)


def test_norm_scales_stay_where_r1_does_not_land_offline() -> None:
    before = program("llama")
    for settings in ({"rotations": "R2,R3,R4"}, {"form": "online"}, {"exclude": ("R1:*",)}):
        after = transformed(before, **settings)
        for key in before.state_dict:
            if "norm" in key:
                assert torch.equal(before.state_dict[key], after.state_dict[key])
        assert sum("layernorm" in str(n.args) or "norm_weight" in str(n.args) for n in after.graph.nodes) == sum(
            "layernorm" in str(n.args) or "norm_weight" in str(n.args) for n in before.graph.nodes
        )


def test_a_tied_table_stays_tied_with_keep_and_costs_its_size_with_untie() -> None:
    before = program("llama_tied")
    kept, untied = (transformed(before, form="offline", tied=t) for t in ("keep", "untie"))
    assert unique_bytes(kept) <= unique_bytes(before) * 1.001
    assert unique_bytes(untied) - unique_bytes(before) == 96 * 48 * 8
    plan = spinpass.plan(before, config(form="offline", tied="untie"))
    assert plan.bytes_added == 96 * 48 * 8
    assert kept.state_dict["lm_head.weight"] is kept.state_dict["model.embed_tokens.weight"]
    assert untied.state_dict["lm_head.weight"] is not untied.state_dict["model.embed_tokens.weight"]


def unique_bytes(ep: ExportedProgram) -> int:
    found = {
        t.data_ptr(): t.numel() * t.element_size()
        for t in [*ep.state_dict.values(), *ep.constants.values()]
        if isinstance(t, Tensor)
    }
    return sum(found.values())


@pytest.mark.parametrize(
    "settings",
    [
        dict(form="offline", tied="keep", kind="random-hadamard"),
        dict(form="offline", tied="untie"),
        dict(form="online", kind="random-matrix"),
    ],
)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2", "starcoder2", "phi3"])
def test_the_plan_counts_the_bytes_that_are_added(name: str, settings: dict[str, object]) -> None:
    """Biases that a norm's bias makes are counted too."""
    before = program(name)
    plan = spinpass.plan(before, config(**settings))
    after = transformed(before, **settings)
    assert plan.bytes_added == unique_bytes(after) - unique_bytes(before), str(plan)


# -- life after the pass ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["offline", "online"])
def rotated(request: pytest.FixtureRequest) -> tuple[ExportedProgram, ExportedProgram]:
    before = program("qwen2", "dynamic", torch.float32)
    return before, spinpass.transform(before, config(form=request.param, kind="random-hadamard"))


def same(before: ExportedProgram, after: ExportedProgram) -> bool:
    assert record.read(after) is not None
    return error(before, after) <= 1e-5


def test_save_and_load(rotated: tuple[ExportedProgram, ExportedProgram], tmp_path: Path) -> None:
    before, after = rotated
    torch.export.save(after, tmp_path / "rotated.pt2")
    loaded = torch.export.load(tmp_path / "rotated.pt2")
    assert same(before, loaded)
    assert record.read(loaded) == record.read(after)


def test_programs_from_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.export.save(program("gpt_neox", "dynamic"), buffer)
    buffer.seek(0)
    before = torch.export.load(buffer)
    after = transformed(before)
    assert error(before, after) <= EXACT
    assert (
        relative_error(
            run(after, synthetic_inputs(before)),
            run(transformed(program("gpt_neox", "dynamic")), synthetic_inputs(before)),
        )
        == 0
    )


@pytest.mark.parametrize("table", ["empty", "default"])
def test_run_decompositions(rotated: tuple[ExportedProgram, ExportedProgram], table: str) -> None:
    before, after = rotated
    lowered = after.run_decompositions({}) if table == "empty" else after.run_decompositions()
    assert same(before, lowered)
    assert any("hadamard" in str(n.target) for n in lowered.graph.nodes)


def test_deepcopy(rotated: tuple[ExportedProgram, ExportedProgram]) -> None:
    before, after = rotated
    assert same(before, copy.deepcopy(after))


def test_module_takes_other_sizes(rotated: tuple[ExportedProgram, ExportedProgram]) -> None:
    before, after = rotated
    for batch, seq in ((1, 3), (3, 11)):
        ids = models.sample_inputs(batch=max(batch, 2), seq=seq, mask=False)
        with torch.no_grad():
            a, b = before.module()(**ids, use_cache=False), after.module()(**ids, use_cache=False)
        assert relative_error(a, b) <= 1e-4


def test_reexport(rotated: tuple[ExportedProgram, ExportedProgram]) -> None:
    before, after = rotated
    again = torch.export.export(
        after.module(), (), {**models.sample_inputs(mask=False), "use_cache": False}, strict=False
    )
    inputs = models.sample_inputs(mask=False)
    with torch.no_grad():
        assert (
            relative_error(before.module()(**inputs, use_cache=False), again.module()(**inputs, use_cache=False))
            <= 1e-4
        )


def test_compile(rotated: tuple[ExportedProgram, ExportedProgram]) -> None:
    before, after = rotated
    inputs = models.sample_inputs(mask=False)
    compiled = torch.compile(after.module(), backend="aot_eager")
    with torch.no_grad():
        assert relative_error(before.module()(**inputs, use_cache=False), compiled(**inputs, use_cache=False)) <= 1e-4


def test_gradients_flow_through_the_rotated_module(rotated: tuple[ExportedProgram, ExportedProgram]) -> None:
    module = rotated[1].module()
    for p in module.parameters():
        p.requires_grad_(True)
    flat(module(**models.sample_inputs(mask=False), use_cache=False))[0].square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


# -- a second time -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["offline", "online", "auto"])
@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gemma2"])
def test_rotating_a_rotated_program_is_exact_or_refused(name: str, form: str) -> None:
    before = program(name)
    once = transformed(before, form=form)
    try:
        twice = transformed(once, form=form, kind="random-hadamard")
    except RefusedError as refused:
        assert "rotated" in str(refused)
        return
    assert error(before, twice) <= EXACT


def test_one_rotation_after_the_other_equals_all_at_once() -> None:
    before = program("llama_bias")
    step = before
    roles = [r for r in ROLES if r not in ("latent", "gates")]  # there is no latent, and gates take given matrices alone
    for role in roles:
        step = transformed(step, rotations=role, form="offline" if role == "R1" else "auto")
    assert error(before, step) <= EXACT
    found = record.read(step)
    assert found is not None
    assert {n.split(":")[0] for n in found.rotations} == set(roles), "the record forgets earlier rotations"


# -- exporters and caches ------------------------------------------------------------------------------------------------------------

CACHED = ["llama_bias", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "gemma3_text", "phi3"))]
PAIRED = [n for n in CACHED if getattr(n, "values", ("",))[0] != "gemma3_text"]  # its prefill takes a cache too


@pytest.mark.parametrize(
    "name", ["llama_tied", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3_text", "gpt_neox"))]
)
def test_programs_of_the_transformers_exporter(name: str) -> None:
    before = program(name, "hf")
    for form in ("offline", "online"):
        after = transformed(before, form=form)
        assert error(before, after) <= EXACT


@pytest.mark.parametrize("how", ["cache", "prefill", "decode"])
@pytest.mark.parametrize("name", CACHED)
def test_programs_with_a_cache_pass_the_closed_loop(name: str, how: str) -> None:
    before = program(name, how)
    for settings in (
        dict(form="offline"),
        dict(form="online", kind="random-hadamard"),
        dict(kind="random-matrix", block_size=4),
    ):
        after = transformed(before, **settings)
        certificate = spinpass.verify(before, after)
        assert certificate.ok, str(certificate)
        found = record.read(after)
        assert found is not None
        assert len(found.outputs) == 4  # keys and values of two layers
        assert len(found.inputs) == (0 if how == "prefill" else 4)


@pytest.mark.parametrize("name", CACHED)
def test_a_plain_cache_keeps_its_basis(name: str) -> None:
    before = program(name, "cache")
    after = transformed(before, cache="plain")
    assert error(before, after) <= EXACT  # run raw: no output may be in another basis
    found = record.read(after)
    assert found is not None and not found.inputs and not found.outputs


@pytest.mark.parametrize("how", ["static_prefill", "static_decode"])
@pytest.mark.parametrize("name", ["llama_bias", "gpt2"])
def test_static_caches(name: str, how: str) -> None:
    before = program(name, how)
    for settings in ({}, {"cache": "plain"}, {"kind": "random-hadamard", "form": "online"}):
        after = transformed(before, **settings)
        certificate = spinpass.verify(before, after)
        assert certificate.ok, str(certificate)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_prefill_and_decode_rotated_apart_share_a_cache(name: str, kind: str) -> None:
    prefill, decode = (program(name, how) for how in ("prefill", "decode"))
    expected = models.prefill_then_decode(prefill, decode)
    rotated = [transformed(p, kind=kind, seed=0 if kind == "hadamard" else 3) for p in (prefill, decode)]
    actual = models.prefill_then_decode(*rotated)
    assert relative_error(expected, actual) <= EXACT


def test_a_cache_of_another_seed_does_not_fit() -> None:
    """The test above can fail."""
    prefill, decode = (program("llama_bias", how) for how in ("prefill", "decode"))
    pair = [transformed(p, kind="random-hadamard", seed=s) for p, s in ((prefill, 1), (decode, 2))]
    assert relative_error(models.prefill_then_decode(prefill, decode), models.prefill_then_decode(*pair)) > 1e-3


def test_names_and_rotations_of_prefill_and_decode_agree() -> None:
    for name in ("llama_bias", "gpt2"):
        plans = [
            spinpass.plan(program(name, how), config(kind="random-hadamard")) for how in ("prefill", "decode", "cache")
        ]
        a, *others = [{s.name: s.rotation.fingerprint() for s in p.spaces} for p in plans]
        for other in others:
            assert a == other


# -- an encoder and a decoder -----------------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_exact_or_refused() -> None:
    before = models.export_plain(models.build("t5", dtype=torch.float64), models.sample_inputs("t5", mask=False))
    for form in ("offline", "online", "auto"):
        try:
            after = transformed(before, form=form)
        except RefusedError as refused:
            assert str(refused).count("\n") >= 1
            continue
        assert error(before, after) <= EXACT


# -- the certificate ------------------------------------------------------------------------------------------------------------------


def test_programs_are_certified_unless_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    module = __import__("spinpass.pipeline", fromlist=["transform"])
    monkeypatch.setattr(module, "verify", lambda *a, **k: calls.append(a) or spinpass.verify(*a, **k))
    spinpass.transform(program("llama"))
    assert len(calls) == 1
    spinpass.transform(program("llama"), config(verify=False))
    assert len(calls) == 1
    spinpass.transform(program("llama"), config(verify=True))
    assert len(calls) == 2


def test_a_failed_certificate_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rotation, "apply", lambda self, x, dim=-1, *, inverse=False, dual=False: x * 1.01)
    with pytest.raises(VerificationError, match=r"not equivalent.*; the space to blame is R1:\S+: leave it out"):
        spinpass.transform(program("llama"))


def test_the_space_to_blame_is_named_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotations of one space alone are wrong."""
    source, settings = program("llama"), config(verify=True, kind="random-hadamard")
    sound = spinpass.plan(source, settings)
    guilty = next(s for s in sound.spaces if s.role == "R2")
    bad, real = guilty.rotation.fingerprint(), Rotation.apply

    def apply(self: Rotation, x: torch.Tensor, dim: int = -1, *, inverse: bool = False, dual: bool = False) -> torch.Tensor:
        return real(self, x, dim, inverse=inverse) * (1.01 if self.fingerprint() == bad else 1)

    monkeypatch.setattr(Rotation, "apply", apply)
    with pytest.raises(VerificationError, match=f"the space to blame is {re.escape(guilty.name)}: leave it out"):
        spinpass.rotate(source, settings)
    partial = spinpass.rotate(source, settings, allow_partial=True)
    assert {s.name for s in partial.plan.spaces} == {s.name for s in sound.spaces} - {guilty.name}
    assert partial.certificate is not None and partial.certificate.ok
    assert any(r.what == guilty.name and "is not the original's" in r.why for r in partial.plan.refusals)
    with pytest.raises(VerificationError, match="to blame"):
        spinpass.rotate(source, plan=sound.without(*(s.name for s in sound.spaces if s is not guilty)), allow_partial=True)


def test_progress_counts_every_constant() -> None:
    seen: list[tuple[int, int]] = []
    spinpass.transform(program("llama"), config(), progress=lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == list(range(1, seen[0][1] + 1))


# -- plans ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["offline", "online", "auto"])
def test_a_plan_carried_out_equals_its_configuration(form: str) -> None:
    before = program("qwen2")
    settings = config(form=form, kind="random-hadamard")
    a = spinpass.transform(before, settings)
    b = spinpass.transform(before, plan=spinpass.plan(before, settings))
    assert (
        all(torch.equal(a.state_dict[k], b.state_dict[k]) for k in a.state_dict)
        and a.state_dict.keys() == b.state_dict.keys()
    )
    assert a.graph_module.code == b.graph_module.code


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])
def test_spaces_left_out_of_a_plan_are_left_alone(name: str) -> None:
    before = program(name)
    for form in ("offline", "online"):
        plan = spinpass.plan(before, config(form=form))
        for space in plan.spaces:
            after = spinpass.transform(before, plan=plan.without(space.name))
            assert error(before, after) <= EXACT
            found = record.read(after)
            assert found is not None
            assert set(found.rotations) == {s.name for s in plan.spaces} - {space.name}


def test_a_plan_of_another_program() -> None:
    plan = spinpass.plan(program("gpt2"), config())
    with pytest.raises(ConfigError, match="the plan is of another program: .*plan this program anew"):
        spinpass.transform(program("llama"), plan=plan)


def test_a_config_beside_a_plan() -> None:
    plan = spinpass.plan(program("llama"), config())
    with pytest.raises(ConfigError, match="either a config or a plan"):
        spinpass.transform(program("llama"), config(), plan=plan)


def test_a_config_of_the_wrong_type() -> None:
    with pytest.raises(ConfigError, match="config is a dict"):
        spinpass.transform(program("llama"), {"kind": "hadamard"})  # type: ignore[arg-type]


# -- bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), None, "model.pt2"])
def test_something_that_is_not_a_program(what: object) -> None:
    with pytest.raises(ProgramError, match=f"expected a torch.export.ExportedProgram, got {type(what).__name__}"):
        spinpass.transform(what)  # type: ignore[arg-type]


def test_an_encoder_without_a_residual_stream() -> None:
    model = made(torch.nn.Sequential(torch.nn.Embedding(40, 24), torch.nn.Tanh()))
    with pytest.raises(RefusedError, match="(?s)nothing was rotated.*R1: .*residual stream.*R2: .*R3: .*R4: "):
        spinpass.transform(exported(model))


class Dropped(Decoder):
    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.nn.functional.dropout(x, 0.25, self.training)


class AttentionDropped(Decoder):
    def between(self, x: Tensor, layer: int) -> Tensor:
        y = x[:, None]
        return (
            x
            + torch.nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.25 if self.training else 0.0)[:, 0]
        )


@pytest.mark.parametrize("model", [Dropped, AttentionDropped])
def test_active_dropout(model: type[Decoder]) -> None:
    with pytest.raises(ProgramError, match=r"dropout is active \(p=0.25\).*eval"):
        spinpass.transform(exported(made(model()).train()))
    assert outcome(exported(made(model()))).error <= EXACT


def test_quantized_weights() -> None:
    class Packed(Decoder):
        def prepare(self) -> None:
            self.register_buffer("packed", torch.randint(-8, 8, (24, 24), dtype=torch.int8))

        def between(self, x: Tensor, layer: int) -> Tensor:
            scale = torch.ones(24, dtype=x.dtype)
            zero = torch.zeros(24, dtype=torch.int64)
            w = torch.ops.quantized_decomposed.dequantize_per_channel(self.packed, scale, zero, 0, -8, 7, torch.int8)
            return x + torch.nn.functional.linear(self.norm(x), w.to(x.dtype))

    import torch.ao.quantization.fx._decomposed

    with pytest.raises(QuantizedWeightError, match="dequantize_per_channel.*quantize the result"):
        spinpass.transform(exported(made(Packed())))


def test_tokens_are_not_special() -> None:
    """The errors above are not an accident of one input."""
    before = program("llama_bias", "dynamic")
    after = transformed(before)
    assert max(error(before, after, seed) for seed in range(3)) <= EXACT
    assert tokens().shape == (2, 5)


# -- one call ------------------------------------------------------------------------------------------------------------------------


def test_one_call_returns_program_plan_and_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    before, settings = program("llama"), config(verify=True)
    planned, walked = spinpass.plan(before, settings), 0
    real = Planner.edits

    def counted(self: Planner) -> Any:
        nonlocal walked
        walked += 1
        return real(self)

    monkeypatch.setattr(Planner, "edits", counted)
    found = spinpass.rotate(before, settings)
    assert walked == 1, "the program was analysed more than once"
    assert str(found.plan) == str(planned)
    assert found.certificate is not None and found.certificate.ok
    written = record.read(found.program)
    assert written is not None and written.certificate == found.certificate.to_dict()
    assert spinpass.rotate(before, config(verify=False)).certificate is None


def test_the_planner_edits_nothing() -> None:
    """What has to be untied is asked for, and left to the caller."""
    editor = open_program(program("llama_tied"))
    planner = Planner(editor, config(tied="untie", form="offline"))
    before = (str(editor.graph), editor.nbytes(), list(editor.queued()))
    asked = next(planner.edits())
    assert isinstance(asked, UntieRequest) and [editor.fqn(n) for n in asked.constants] == ["lm_head.weight"]
    assert (str(editor.graph), editor.nbytes(), list(editor.queued())) == before

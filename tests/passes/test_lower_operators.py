"""lower: no operator of spinpass is left, and the program computes what it did, where spinpass was never imported too."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import operators, record
from spinpass.errors import ExportError, ProgramError, QuantizedWeightError
from spinpass.execution.interpreter import run
from spinpass.graph import op_name
from spinpass.operators import FORMULAS, HADAMARD
from spinpass.quantization import pack, quantize
from tests.support import quantizable
from tests.support.decoders import tokens
from tests.support.programs import program

COMPILER = shutil.which("g++") or shutil.which("clang++")


def names(ep: ExportedProgram) -> list[str]:
    return [op_name(node) for node in ep.graph.nodes if node.op == "call_function"]


def own(ep: ExportedProgram) -> set[str]:
    return {name for name in names(ep) if name.startswith("spinpass::")}


def made(call: Any, x: Tensor, *, constants: dict[str, Tensor] | None = None) -> ExportedProgram:
    """``call(x, constants)`` with the first axes of x dynamic."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, tensor in (constants or {}).items():
                self.register_buffer(key, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return call(x, dict(self.named_buffers()))

    return torch.export.export(Module(), (x,), dynamic_shapes=({0: Dim("b"), 1: Dim("s")},))


def packed_constants(bits: int, columns: int, rows: int, size: int, ordered: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    groups = math.ceil(columns / size)
    q, z = torch.randint(0, 2**bits, (columns, rows)), torch.randint(0, 2**bits, (groups, rows))
    found = {
        "qweight": operators.pack_words(q, bits, 0),
        "scales": torch.rand(groups, rows, dtype=dtype) + 0.1,
        "qzeros": operators.pack_words(z, bits, 1),
        "bias": torch.randn(rows, dtype=dtype),
    }
    return found if ordered else found | {"g_idx": torch.randint(0, groups, (columns,), dtype=torch.int32)}


_ops = torch.ops.spinpass
ROUNDINGS = {
    "tokens": lambda x, c: _ops.round_tokens(x, 8, True),
    "tokens from zero": lambda x, c: _ops.round_tokens(x, 4, False, 0.9),
    "tensor": lambda x, c: _ops.round_tensor(x, c["scale"], c["zero"], 8),
    "rows": lambda x, c: _ops.round_rows(x, c["scale"], c["zero"], 2.0, 8),
    "rows without limit": lambda x, c: _ops.round_rows(x, c["scale"], c["zero"], math.inf, 4),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("call", ROUNDINGS.values(), ids=ROUNDINGS)
def test_roundings_are_equal_bit_for_bit(call: Any, dtype: torch.dtype) -> None:
    ep = made(call, torch.zeros(2, 3, 16, dtype=dtype), constants={"scale": torch.rand(16) + 0.05, "zero": torch.full((16,), 7.0)})
    lowered = spinpass.lower(ep)
    assert len(own(ep)) == 1 and not own(lowered)
    assert not [n for n in lowered.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    x = torch.randn(4, 5, 16).to(dtype) * 3
    x[0, 0] = 0
    expected, actual = ep.module()(x), lowered.module()(x)
    assert actual.dtype == dtype and torch.equal(actual, expected)
    assert not torch.equal(actual, x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [True, False], ids=["side by side", "any order"])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[:3], ids=list(DTYPES)[:3])
def test_packed_linears_are_equal_bit_for_bit(bits: int, ordered: bool, dtype: torch.dtype) -> None:
    constants = packed_constants(bits, 40, 24, 16, ordered, dtype)

    def call(x: Tensor, c: dict[str, Tensor]) -> Any:
        return _ops.packed_linear(x, c["qweight"], c["scales"], c["qzeros"], c.get("g_idx"), c["bias"], bits)

    ep = made(call, torch.zeros(2, 3, 40, dtype=dtype), constants=constants)
    lowered = spinpass.lower(ep)
    assert own(ep) == {"spinpass::packed_linear"} and not own(lowered)
    assert names(lowered).count("aten::linear") == 1
    x = torch.randn(4, 5, 40).to(dtype)
    assert torch.equal(lowered.module()(x), ep.module()(x))


def test_rounded_weights_are_equal_bit_for_bit() -> None:
    constants = packed_constants(4, 40, 24, 16, True, torch.float32)
    ep = made(lambda x, c: _ops.round_weight(x[0], c["scales"], c["qzeros"], None, 4) + 0 * x, torch.zeros(2, 24, 40), constants=constants)
    x = torch.randn(3, 24, 40)
    assert torch.equal(spinpass.lower(ep).module()(x), ep.module()(x))


def test_every_operator_of_the_package_has_a_way_down() -> None:
    """A new operator without a formula would be found here, not by a user of AOTInductor."""
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("spinpass::")}
    assert registered == {*FORMULAS, HADAMARD}


@cache
def rotated(dtype: torch.dtype = torch.float64) -> ExportedProgram:
    return spinpass.transform(program("llama_tied", "cache", dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rotated_decoders_keep_function_signature_and_record(dtype: torch.dtype) -> None:
    before = [str(node) for node in rotated(dtype).graph.nodes]
    lowered = spinpass.lower(rotated(dtype))
    assert own(rotated(dtype)) == {HADAMARD} and not own(lowered)
    assert [str(node) for node in rotated(dtype).graph.nodes] == before, "the program given was changed"
    assert lowered.graph_signature.user_inputs == rotated(dtype).graph_signature.user_inputs
    assert lowered.range_constraints == rotated(dtype).range_constraints
    assert record.read(lowered) == record.read(rotated(dtype)) is not None
    certificate = spinpass.verify(rotated(dtype), lowered)
    assert certificate.ok, certificate


SCHEMES = {"tokens and caches": "w4g16-rtn-a8-kv4", "static": "w8-rtn-a8static"}


@cache
def quantized(scheme: str) -> Any:
    return quantize(spinpass.transform(quantizable.program()), scheme, quantizable.inputs())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_packed_quantized_decoders_compute_the_same(scheme: str) -> None:
    packed = pack(quantized(scheme)).program
    lowered = spinpass.lower(packed)
    assert {HADAMARD, "spinpass::packed_linear"} < own(packed) and not own(lowered)
    packed_names = {n for n, t in packed.state_dict.items() if not t.is_floating_point()}
    assert packed_names and all(isinstance(lowered.state_dict[n], nn.Parameter) for n in packed_names)
    assert record.read(lowered) == record.read(packed) is not None
    ids = quantizable.inputs(1)[0]
    expected, actual = run(packed, ids)[0], run(lowered, ids)[0]
    # a Hadamard's rounding may move a value across a rounding's step: most are equal, and none is far off
    assert float((actual - expected).norm() / expected.norm()) < 1e-2
    with pytest.raises(QuantizedWeightError):
        spinpass.transform(lowered)


def test_lowering_again_changes_nothing() -> None:
    once = spinpass.lower(pack(quantized(SCHEMES["static"])).program)
    twice = spinpass.lower(once)
    assert names(twice) == names(once) and twice.state_dict.keys() == once.state_dict.keys()
    assert all(twice.state_dict[name] is once.state_dict[name] or torch.equal(twice.state_dict[name], once.state_dict[name]) for name in once.state_dict)


def test_a_program_without_operators_of_spinpass_is_an_equal_copy() -> None:
    ep = program("llama_tied")
    lowered = spinpass.lower(ep)
    assert lowered is not ep and lowered.graph is not ep.graph
    assert [(n.name, n.target) for n in lowered.graph.nodes] == [(n.name, n.target) for n in ep.graph.nodes]
    assert lowered.state_dict.keys() == ep.state_dict.keys()
    assert all(t.data_ptr() == ep.state_dict[name].data_ptr() for name, t in lowered.state_dict.items())


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ProgramError, match="lower takes a torch.export.ExportedProgram, got Linear"):
        spinpass.lower(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_broken_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is broken on purpose: the comparison of bits notices a rounding towards zero."""
    from spinpass.passes import lower_operators

    monkeypatch.setattr(lower_operators, "FORMULAS", {"spinpass::round_tokens": lambda x, bits, symmetric, clip: x.trunc()})
    ep = made(ROUNDINGS["tokens"], torch.zeros(2, 3, 16))
    x = torch.randn(4, 5, 16)
    assert not torch.equal(spinpass.lower(ep).module()(x), ep.module()(x))


def test_an_operator_in_a_branch_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda y: _ops.hadamard(y, 4), lambda y: y.clone(), (x,))

    ep = torch.export.export(Branches(), (torch.ones(2, 8),))
    with pytest.raises(ExportError, match="spinpass::hadamard cannot be written in operators of torch here"):
        spinpass.lower(ep)


@pytest.mark.skipif(COMPILER is None, reason="AOTInductor needs a C++ compiler, and neither g++ nor clang++ is here")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["rotated", "packed"])
def test_aoti_packages_run_where_spinpass_was_never_imported(how: str, tmp_path: Path) -> None:
    source = spinpass.transform(quantizable.program()) if how == "rotated" else pack(quantized("w4g16-rtn-a8")).program
    package = torch._inductor.aoti_compile_and_package(spinpass.lower(source), package_path=str(tmp_path / "model.pt2"))
    ids = tokens()
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        f"import sys, torch; f = torch._inductor.aoti_load_package({str(package)!r}); "
        f"torch.save(f(torch.load({str(tmp_path / 'ids.pt')!r})), {str(tmp_path / 'out.pt')!r}); "
        "assert not [m for m in sys.modules if m.startswith('spinpass')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actual, expected = torch.load(tmp_path / "out.pt"), run(source, (ids,))[0]
    actual = actual[0] if isinstance(actual, (list, tuple)) else actual
    bound = 1e-4 if how == "rotated" else 0.05  # fused arithmetic moves single values across a rounding's step
    assert float((actual - expected).norm() / expected.norm()) < bound


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler, and neither g++ nor clang++ is here")
def test_torch_compile_takes_a_rotated_program() -> None:
    source = spinpass.transform(quantizable.program())
    with torch.no_grad():
        actual = torch.compile(source.module())(tokens())
    expected = run(source, (tokens(),))[0]
    actual = actual[0] if isinstance(actual, (list, tuple)) else actual
    assert float((actual - expected).norm() / expected.norm()) < 1e-4

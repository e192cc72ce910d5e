"""No device is assumed: every factory names one, nothing mixes two, and ``--device`` is checked before anything is read.

What is run on a device that is none (:mod:`tests.support.elsewhere`) is run in a process of its own, once for all cases.
With a real device, the last tests compare it with the CPU.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.backend_registration as backends

import spinpass
from spinpass.errors import ConfigError
from spinpass.evaluation import EvalRequest, ProgramScorer, perplexity
from spinpass.folders import export, rotate_checkpoint
from spinpass.graph import device_of, on_device
from spinpass.loading import load_model
from spinpass.quantization import quantize
from spinpass.reporting import ReportRequest
from tests.support import commands, folders, quantizable
from tests.support.elsewhere_cases import CASES, MUTATIONS, SLOW

ROOT = Path(__file__).parents[1]
FILES = sorted(file for top in ("spinpass", "optimum") for file in (ROOT / top).rglob("*.py"))

# -- factories ---------------------------------------------------------------------------------------------------------

FACTORIES = frozenset(
    ["arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "complex", "empty", "empty_permuted", "empty_quantized", "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "Tensor", "FloatTensor", "LongTensor", "Generator"]
)
"""What makes tensors of torch out of none, or draws numbers. ``zeros_like`` and ``x.new_zeros`` take the device of what
they are given; ``from_numpy``, ``frombuffer`` and ``from_file`` are views of the host's memory, and cannot be elsewhere."""


def without_device(source: str) -> Iterator[str]:
    """Every call of a factory that names no device, as LINE: CALL."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and _is_factory(node.func)):
            continue
        by_position = node.func.attr == "Generator" and node.args  # type: ignore[union-attr]
        if not by_position and all(keyword.arg != "device" for keyword in node.keywords):
            yield f"{node.lineno}: {ast.unparse(node)}"


def _is_factory(called: ast.expr) -> bool:
    return (
        isinstance(called, ast.Attribute)
        and called.attr in FACTORIES
        and isinstance(called.value, ast.Name)
        and called.value.id == "torch"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_factory_names_a_device(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    found = [f"{file.relative_to(ROOT)}:{each}" for each in without_device(source)]
    assert not found, "a tensor is made where nobody asked for it:\n" + "\n".join(found)
    imported = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {name.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for name in node.names
        if name.name in FACTORIES - {"Tensor"}
    ]
    assert not imported, "call factories as torch.NAME, so that they are seen here:\n" + "\n".join(imported)
    bare = [f"{n.lineno}" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and _is_bare_tensor(n.func)]
    assert not bare, f"{file.relative_to(ROOT)}: Tensor(…) takes no device: line {', '.join(bare)}"


def _is_bare_tensor(called: ast.expr) -> bool:
    return isinstance(called, ast.Name) and called.id == "Tensor"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, dtype=x.dtype)", True),
        ("torch.zeros(3, device=x.device)", False),
        ("torch.Generator().manual_seed(0)", True),
        ("torch.Generator('cpu').manual_seed(0)", False),
        ("torch.zeros_like(x) + x.new_ones(3)", False),
        ("a + f(torch.tensor([1]))", True),
    ],
)
def test_a_factory_without_a_device_is_seen(line: str, seen: bool) -> None:
    assert bool(list(without_device(line))) is seen


# -- a device that is none ---------------------------------------------------------------------------------------------

needs_registration = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="this torch has no devices made in Python"
)


def try_cases(*cases: str) -> dict[str, str]:
    """What went wrong elsewhere, by case."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.elsewhere_cases", *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def tried() -> dict[str, str]:
    """The same of all quick cases, from one process."""
    return try_cases(*(case for case in (*CASES, *MUTATIONS) if case not in SLOW))


@pytest.fixture(scope="module")
def tried_at_length() -> dict[str, str]:
    """The same of the others."""
    return try_cases(*SLOW)


@needs_registration
@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW])
def test_elsewhere_it_is_as_on_the_cpu(case: str, tried: dict[str, str]) -> None:
    assert not tried[case]


@needs_registration
@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(SLOW))
def test_elsewhere_the_rest_is_as_on_the_cpu(case: str, tried_at_length: dict[str, str]) -> None:
    assert not tried_at_length[case]


@needs_registration
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_two_devices_are_seen(mutation: str, tried: dict[str, str]) -> None:
    """The check itself: with a fault in the product the case fails, for that reason."""
    assert "MixedDevices" in tried[mutation]


# -- devices that are not there ----------------------------------------------------------------------------------------

NOT_THERE = "finds no CUDA device here: choose cpu"


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_python_says_so_before_anything_is_read(no_device: None, tmp_path: Path) -> None:
    absent, out = tmp_path / "absent", tmp_path / "out"
    for call in (
        lambda: export(absent, out, device="cuda"),
        lambda: rotate_checkpoint(absent, out, device="cuda"),
        lambda: load_model(absent, device="cuda"),
        lambda: EvalRequest(str(absent), device="cuda"),
        lambda: ReportRequest(str(absent), device="cuda"),
        lambda: on_device(quantizable.program(), "cuda"),
    ):
        with pytest.raises(ConfigError, match=NOT_THERE):
            call()
    with pytest.raises(ConfigError, match="device 'tpu' is not one of cpu, cuda, cuda:N"):
        export(absent, out, device="tpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("export", "absent", "out"),
        ("tune", "absent", "--quantize", "w4-rtn"),
        ("eval", "absent"),
        ("report", "absent"),
        ("rotate-checkpoint", "absent", "out"),
        ("rotate", "absent.pt2", "out.pt2"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(("device", "says"), [("cuda", NOT_THERE), ("tpu", "device 'tpu' is not one of")])
def test_the_command_line_says_so_before_anything_is_read(
    command: tuple[str, ...], device: str, says: str, no_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = commands.run(*command, "--device", device)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


# -- a real device -----------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("scheme", ["w4g16-rtn", "w4g16-gptq", "w8-rtn-a8static", "w4-asym-gptq-a4-kv4", "w3.5g16-gptq"])
def test_a_real_device_rounds_to_the_same_codes(scheme: str) -> None:
    """But for the order of sums: a code may differ where a weight lies between two of them."""
    here = quantizable.program()
    there = on_device(here, "cuda")
    inputs = quantizable.inputs(4)
    expected = quantize(here, scheme, inputs)
    made = quantize(there, scheme, [tuple(tensor.cuda() for tensor in each) for each in inputs])
    assert device_of(made.program).type == "cuda"
    assert expected.report.weights.keys() == made.report.weights.keys()
    for name, weight in expected.report.weights.items():
        codes = made.report.weights[name].codes
        assert codes.q.device.type == "cpu"
        assert (codes.q == weight.codes.q).double().mean() > 0.98, name
        assert made.report.weights[name].error == pytest.approx(weight.error, rel=0.02)
    windows = [[int(token) for token in each[0][0]] for each in inputs]
    scores = [perplexity(ProgramScorer(each.program), windows).loss for each in (expected, made)]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)


@needs_cuda
def test_a_real_device_rotates_and_certifies() -> None:
    made = spinpass.rotate(on_device(quantizable.program(), "cuda"))
    assert made.certificate is not None and made.certificate.ok
    expected = spinpass.rotate(quantizable.program()).program.state_dict
    for name, tensor in made.program.state_dict.items():
        assert tensor.is_cuda
        torch.testing.assert_close(tensor.detach().cpu(), expected[name].detach())


@needs_cuda
def test_a_real_device_exports_the_same_folder(tmp_path: Path) -> None:
    model = folders.model_folder(tmp_path / "model")
    cards: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        written = export(model, tmp_path / device, bits=4, recipe="quick", device=device)
        cards[device] = written.manifest["card"]
    assert cards["cpu"]["ratio"] == pytest.approx(cards["cuda"]["ratio"], rel=0.01)

"""ExecuTorch: .pte files run by its own runtime against the program, in floats, in integers and with a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from typer.testing import CliRunner

pytest.importorskip("executorch")

import spinpass
from spinpass.cli.app import app
from spinpass.errors import ConfigError, ExportError, ProgramError, VerificationError
from spinpass.execution.interpreter import run
from spinpass.exporters.executorch import certificate as executorch_certificate
from spinpass.exporters.executorch import writer as executorch
from spinpass.exporters.executorch.integers import with_integer_layers
from spinpass.graph import op_name
from spinpass.loading.static_cache import export_static_cache
from spinpass.passes.lower_hadamards import lower_hadamards
from spinpass.passes.own_constants import give_own_constants
from spinpass.quantization import Quantized, quantize
from spinpass.runtime.executorch_session import PteMethod
from spinpass.runtime.pte_decoder import PteDecoder
from tests.support import decoders, folders, models
from tests.support.decoders import made, snapshot, tokens
from tests.support.kronecker import by_factors

CONTEXT = 24
TINY: dict[str, Any] = dict(num_hidden_layers=1, vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=16,
                            num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


def decoder(**shape: Any) -> ExportedProgram:
    """Without a cache, of static shape, in float32."""
    sizes: dict[str, Any] = dict(hidden=32, ffn=64, heads=2, kv=1, head=16) | shape
    return decoders.exported(made(decoders.Decoder(**sizes), dtype=torch.float32))


def rotated(program: ExportedProgram, **options: Any) -> ExportedProgram:
    return spinpass.transform(program, spinpass.RotationConfig(verify=False, **options))


class Perceptron(nn.Module):
    """Layers around a nonlinearity that a Hadamard stands behind, and a head."""

    def __init__(self, inner: int = 96) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, inner), nn.Linear(inner, 32, bias=False), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.nn.functional.silu(self.up(x)))))


def perceptron(inner: int = 96) -> ExportedProgram:
    rows = Dim("rows", min=1, max=16)
    model = made(Perceptron(inner), dtype=torch.float32)
    return torch.export.export(model, (torch.zeros(1, 3, 64),), dynamic_shapes=({1: rows},))


def integers(scheme: str, program: ExportedProgram | None = None) -> Quantized:
    return quantize(program or perceptron(), scheme)


# -- floats -----------------------------------------------------------------------------------------------------------


def test_a_rotated_program_is_delegated_like_the_original(tmp_path: Path) -> None:
    """And returns what the original returns in PyTorch."""
    program = decoder()
    before = snapshot(program)
    changed = rotated(program)
    assert any(op_name(node) == "spinpass::hadamard" for node in changed.graph.nodes)
    plain, report = (executorch.export(p, tmp_path / name) for p, name in ((program, "a"), (changed, "b/x.pte")))
    assert snapshot(program) == before
    assert (plain.path, report.path) == (tmp_path / "a" / "model.pte", tmp_path / "b" / "x.pte")
    assert report.delegates <= plain.delegates > 0 and report.certificate is not None and report.certificate.ok
    left = {name: count for name, count in report.operators.items() if count > plain.operators.get(name, 0)}
    assert not left.keys() - {"getitem", "aten.view_copy.default", "aten.permute_copy.default"}, left
    (result,) = PteMethod(report.path).run([tokens()])
    assert (result - run(program, (tokens(),))[0]).abs().max() < 1e-4
    assert list(report.to_dict()["certificate"]) == [*plain.to_dict()["certificate"]]


def test_kronecker_factors_are_delegated_like_hadamards_of_the_same_sizes(tmp_path: Path) -> None:
    program = decoder()
    config = spinpass.RotationConfig(form="online", verify=False)
    asked = by_factors(program, config)
    assert {key.partition(":")[0] for key in asked} >= {"R1", "R3", "R4"}
    plain = executorch.export(spinpass.transform(program, config), tmp_path / "a")
    changed = spinpass.transform(program, replace(config, matrices=asked))
    report = executorch.export(changed, tmp_path / "b")
    assert report.certificate is not None and report.certificate.ok and 0 < report.delegates <= plain.delegates
    (result,) = PteMethod(report.path).run([tokens()])
    assert (result - run(program, (tokens(),))[0]).abs().max() < 1e-4


def test_the_portable_backend_delegates_nothing(tmp_path: Path) -> None:
    report = executorch.export(rotated(perceptron(), form="online"), tmp_path, backend="portable")
    assert report.delegates == 0 and "aten.addmm.default" in report.operators
    assert report.certificate is not None and report.certificate.worst.difference.relative < 1e-5


class Counter(nn.Module):
    """A buffer that starts at 3."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


def test_buffers_start_with_what_they_hold_and_keep_what_is_written(tmp_path: Path) -> None:
    report = executorch.export(torch.export.export(Counter(), (torch.ones(1, 2),)), tmp_path)
    assert report.certificate is not None and report.certificate.steps == 3
    method = PteMethod(report.path)
    assert [float(method.run([torch.ones(1, 2)])[0][0, 0]) for _ in range(3)] == [4, 5, 6]


class Twice(nn.Module):
    """One layer applied to two values, the second of which depends on what is not delegated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.flip(self.layer(x), [0]))


def test_every_layer_gets_a_constant_of_its_own(tmp_path: Path) -> None:
    program = torch.export.export(made(Twice(), dtype=torch.float32), (torch.randn(2, 8),))
    own = give_own_constants(program)
    weights = [node.args[1] for node in own.graph.nodes if op_name(node) == "aten::linear"]
    assert len(set(weights)) == 2
    assert give_own_constants(own) is own and give_own_constants(program, but=["layer.weight"]) is program
    report = executorch.export(program, tmp_path)
    assert report.certificate is not None and report.certificate.ok


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme, scale_error", [("w4g32-rtn-a8", 2**-8), ("w4-rtn-a8", 0.0), ("w8-rtn-a8", 0.0)])
def test_quantized_layers_become_integers(scheme: str, scale_error: float, tmp_path: Path) -> None:
    """Those of the quantizer: the delegate computes as the graph with these nodes does, which is close to the
    simulation, and the file is smaller."""
    made_of = integers(scheme, rotated(perceptron(), form="online"))
    report = executorch.export(made_of, tmp_path / "integers")
    assert report.integer_layers == 2 and report.scale_error <= scale_error
    assert (report.scale_error > 0) == (scale_error > 0)
    assert not any("quantize" in name or "linear" in name or "mm" in name for name in report.operators)
    graph = with_integer_layers(Quantized(lower_hadamards(made_of.program), made_of.report)).program
    stored = {s.target: graph.state_dict[s.target] for s in graph.graph_signature.input_specs if s.target}
    codes = made_of.report.weights["down.weight"].codes
    assert torch.equal(stored["down.q"].int(), codes.q.int() - codes.zeros.int()[:, codes.group_of])
    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    (found,), (exact,), (simulated,) = PteMethod(report.path).run([x]), run(graph, (x,)), run(made_of.program, (x,))
    assert (found - exact).abs().max() < 0.01 * exact.abs().max()
    assert (found - simulated).norm() < 0.02 * simulated.norm()
    whole = executorch.export(perceptron(), tmp_path / "floats", verify=False)
    assert report.bytes < whole.bytes and whole.uncertified == "switched off"


@pytest.mark.parametrize("scheme, message", [
    ("w4g32-rtn", "its input is aten::|its input is placeholder"),
    ("w4g32-rtn-a4", r"its input is spinpass::round_tokens\[4"),
    ("w4g16-rtn-a8", "groups of 16"),
    ("w8g32-rtn-a8", "8 bits in groups of 32"),
    ("w4g64-rtn-a8", "its groups are not equally long"),
    ("w4-asym-rtn-a8", "its zero points differ"),
    ("a8", "nothing to pack"),
])  # fmt: skip
def test_layers_without_a_kernel_are_refused(scheme: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        executorch.export(integers(scheme), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_odd_number_of_4_bit_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its 33 inputs are an odd number"):
        executorch.export(integers("w4-rtn-a8", perceptron(33)), tmp_path)


def test_simulated_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ExecuTorch has no spinpass::round_tokens: caches, 4-bit"):
        executorch.export(integers("w4g32-rtn-a8").program, tmp_path)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    program: Any = perceptron()
    with pytest.raises(ProgramError, match="got Perceptron"):
        executorch.export(Perceptron(), "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="backend='vulkan' is not one of xnnpack, portable"):
        executorch.export(program, "x", backend="vulkan")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="integer layers run in XNNPACK alone, not with backend='portable'"):
        executorch.export(integers("w4g32-rtn-a8"), "x", backend="portable")


def test_an_axis_needs_an_upper_bound(tmp_path: Path) -> None:
    program = torch.export.export(Perceptron(), (torch.zeros(1, 3, 64),), dynamic_shapes=({1: Dim("rows")},))
    with pytest.raises(ConfigError, match=r"axis 1 of x has no upper bound.*Dim\(name, max=...\)"):
        executorch.export(program, tmp_path)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def test_an_operator_without_kernel(tmp_path: Path) -> None:
    program = torch.export.export(Unknown(), (torch.zeros(3, 3),))
    with pytest.raises(ExportError, match="ExecuTorch cannot (take|run)"):
        executorch.export(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_program_fails(tmp_path: Path) -> None:
    """The certificate can fail: the same graph with one weight changed."""
    program = perceptron()
    report = executorch.export(program, tmp_path)
    program.state_dict["down.weight"].data[0] += 0.1
    certificate = executorch_certificate.certify_pte(program, report.path, (torch.randn(1, 3, 64),))
    assert not certificate.ok and certificate.verdict.startswith("NOT equivalent")
    with pytest.raises(VerificationError, match="the .pte file does not compute what the program computes"):
        certificate.raise_if_failed()


def test_files_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no model at"):
        PteDecoder(tmp_path)
    (tmp_path / "model.pte").write_bytes(b"no program at all" * 9)
    with pytest.raises(ExportError, match="ExecuTorch cannot load model.pte"):
        PteDecoder(tmp_path)
    report = executorch.export(perceptron(), tmp_path, verify=False)
    with pytest.raises(ExportError, match="token ids"):
        PteDecoder(tmp_path)
    with pytest.raises(ExportError, match="ExecuTorch cannot run model.pte"):
        PteMethod(report.path).run([torch.zeros(2, 2, 2, 2)])


# -- with a cache -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("qwen3", **TINY)


@pytest.fixture(scope="module")
def text(model: Any, tmp_path_factory: pytest.TempPathFactory) -> PteDecoder:
    """All of R1 to R4, the cache in their bases, in XNNPACK."""
    program = rotated(export_static_cache(model, CONTEXT))
    report = executorch.export(program, tmp_path_factory.mktemp("decoder"))
    assert report.certificate is not None and report.certificate.steps == 3
    return PteDecoder(report.path.parent)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_that_of_transformers(seed: int, model: Any, text: PteDecoder) -> None:
    prompt = torch.randint(3, 64, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
    count = CONTEXT - prompt.shape[1]
    expected = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(text.generate(prompt[0].tolist(), count, end=()).tokens) == expected[0, prompt.shape[1] :].tolist()
    assert (text.logits(prompt[0].tolist()) - model(prompt).logits[0]).abs().max() < 1e-4


def test_the_cache_has_an_end(text: PteDecoder) -> None:
    assert text.context == CONTEXT
    with pytest.raises(ConfigError, match="25 tokens do not fit into the cache of 24"):
        text.generate(list(range(3, 27)), 2, end=())
    with pytest.raises(ConfigError, match="no tokens to start from"):
        text.generate([], 2)


@pytest.mark.parametrize("settings, context, message", [
    ({}, 4, "a context of 4 tokens: at least 5"),
    ({}, 65, "a context of 65 tokens: the model has 64 positions"),
    (dict(sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"]), 16, "sees a window of 8, which does not slide"),
])  # fmt: skip
def test_contexts_that_do_not_fit(settings: dict[str, Any], context: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_static_cache(models.build("qwen3", **TINY | settings), context)


def test_the_model_is_left_as_it_was(model: Any) -> None:
    settings = model.generation_config
    export_static_cache(model, 8)
    assert model.generation_config is settings and not [n for n, _ in model.named_buffers() if "cache" in n]


@pytest.mark.parametrize("scheme", ["w4g32-bf16-rtn-a8asym", "w8-rtn-a8asym"])
def test_the_kernels_round_as_the_simulation_does(scheme: str, tmp_path: Path) -> None:
    """Zero points of tokens and scales in bfloat16: what is left is the order of sums."""
    quantized = integers(scheme)
    report = executorch.export(quantized, tmp_path)
    assert report.scale_error == 0
    (x,) = (torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)),)
    (result,) = PteMethod(report.path).run([x])
    (expected,) = run(quantized.program, (x,))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    symmetric = run(integers(scheme.replace("a8asym", "a8")).program, (x,))[0]
    assert (result - symmetric).abs().max() > 1e-3 * expected.abs().max()


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_writes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("what is the weather like if it is on " * 20)
    folders.model_folder(tmp_path / "model", "llama_tied", num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    options = ["--to", "executorch", "--context", "24", "--quantize", "w4g32-gptq-a8", "--json"]
    calibration = ["--calibration", str(tmp_path / "text")]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "out"), *options, *calibration])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert set(data["files"]) == {path.name for path in (tmp_path / "out").iterdir()} >= {"model.pte", "tokenizer.json"}
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert manifest["executorch"]["integer_layers"] == 7 and manifest["executorch"]["certificate"]["ok"]
    decoder = PteDecoder(tmp_path / "out")
    prompt = decoder.tokenizer("what is the")["input_ids"]
    assert len(decoder.generate(prompt, 4, end=()).tokens) == 4
    out = str(tmp_path / "out")
    made = CliRunner().invoke(app, ["generate", out, "what is the", "--max-new-tokens", "4", "--json"])
    assert made.exit_code == 0 and json.loads(made.stdout)["new_tokens"] > 0, made.stderr
    talked = CliRunner().invoke(app, ["chat", out, "--max-new-tokens", "2", "--json"], input="is it\nit is\n")
    assert talked.exit_code == 0 and len(json.loads(talked.stdout)["turns"]) == 2, talked.stderr
    windows = ["--windows", "1", "--length", "16", "--text", str(tmp_path / "text"), "--json"]
    scored = CliRunner().invoke(app, ["eval", str(tmp_path / "model"), "--file", out, *windows])
    assert scored.exit_code == 0 and json.loads(scored.stdout)["files"][out]["kl"] > 0, scored.stderr
    refused = CliRunner().invoke(app, ["generate", out, "what is the", "--max-new-tokens", "4", "--threads", "2"])
    assert refused.exit_code == 2 and "is for ExecuTorch, which takes all cores" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("option, message", [("--int4", "packs for ONNX Runtime"), ("--no-cache", "its cache inside")])
def test_options_that_mean_nothing_to_executorch(option: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path), "--to", "executorch", option])
    assert result.exit_code == 2 and message in result.stderr

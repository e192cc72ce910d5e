"""OpenVINO models: what OpenVINO itself computes, at float32, against the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ConfigError, ExportError, ProgramError, VerificationError
from tests.support import models
from tests.support.programs import program

openvino = pytest.importorskip("openvino")

from spinpass.exporters import certified_file  # noqa: E402
from spinpass.exporters import openvino as exporter  # noqa: E402
from spinpass.runtime.openvino_session import CompiledModel, generate_openvino  # noqa: E402


@pytest.fixture(scope="module")
def rotated() -> ExportedProgram:
    config = spinpass.RotationConfig(kind="random-hadamard", verify=False)
    return spinpass.transform(program("llama", "cache", torch.float32), config)


@pytest.fixture(scope="module")
def written(rotated: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> exporter.OpenVINOReport:
    return exporter.export(rotated, tmp_path_factory.mktemp("llama"))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def small(dtype: torch.dtype = torch.float32) -> ExportedProgram:
    return torch.export.export(Scale().to(dtype), (torch.zeros(2, 4, dtype=dtype),), dynamic_shapes=({0: Dim("n")},))


def test_a_rotated_decoder_is_certified(written: exporter.OpenVINOReport, rotated: ExportedProgram) -> None:
    assert [file.name for file in written.files] == ["openvino_model.bin", "openvino_model.xml"]
    assert written.bytes == sum(file.stat().st_size for file in written.path.parent.iterdir())
    assert written.certificate is not None and written.certificate.ok, written.uncertified
    assert written.certificate.verdict.startswith("equivalent: at worst ") and len(written.certificate.outputs) == 5
    assert written.inputs[:3] == ("input_ids", "position_ids", f"{models.cache_argument()}_0")
    assert written.outputs[:2] == ("logits", f"output.{models.cache_argument()}_0")
    assert json.loads(json.dumps(written.to_dict()))["certificate"]["ok"]
    found = openvino.Core().read_model(written.path)
    kept = record.Record.from_dict(json.loads(found.get_rt_info(["spinpass", "record"]).astype(str)))
    assert kept == record.read(rotated)


def test_greedy_tokens_are_those_of_the_model(written: exporter.OpenVINOReport) -> None:
    model = CompiledModel(written.path, threads=1)
    prompts = [[5, 17, 3, 80], [44], list(range(10, 30))]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected = models.build("llama").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore[operator]
        assert generate_openvino(model, prompt, 12) == expected[0, len(prompt) :].tolist()
    assert (
        generate_openvino(model, prompts[0], 12, end=[generate_openvino(model, prompts[0], 3)[2]])[-1]
        == generate_openvino(model, prompts[0], 3)[2]
    )


def test_names_and_replacement(tmp_path: Path) -> None:
    target = tmp_path / "new" / "m.xml"
    for _ in range(2):
        report = exporter.export(small(), target, input_names=["a"], output_names=["b"])
    assert report.path == target and sorted(p.name for p in target.parent.iterdir()) == ["m.bin", "m.xml"]
    model = CompiledModel(target)
    assert (model.inputs, model.outputs, model.shapes) == (("a",), ("b",), ((None, 4),))
    assert report.certificate is not None and report.certificate.inputs[0].startswith("a float32[")


def test_double_precision_is_refused_where_openvino_would_round_it(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="the OpenVINO model does not compute what the program computes: NOT"):
        exporter.export(small(torch.float64), tmp_path / "m.xml")
    assert not list(tmp_path.iterdir())
    report = exporter.export(small(torch.float64), tmp_path / "m.xml", verify=False)
    assert report.certificate is None and report.uncertified == "switched off"


def test_bfloat16_is_written_uncertified(tmp_path: Path) -> None:
    report = exporter.export(small(torch.bfloat16), tmp_path / "m.xml")
    assert report.uncertified == "OpenVINO's Python interface has no torch.bfloat16"
    with pytest.raises(ExportError, match="cannot be certified: OpenVINO's Python interface has no torch.bfloat16"):
        exporter.export(small(torch.bfloat16), tmp_path / "m.xml", verify=True)


def test_the_limit_of_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified_file, "CERTIFY_BYTES", 10)
    report = exporter.export(small(), tmp_path / "m.xml")
    assert report.uncertified == "64 bytes of weights are above the limit of 10: pass verify=True"
    assert exporter.export(small(), tmp_path / "m.xml", verify=True).certificate is not None


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="takes a torch.export.ExportedProgram, got Scale"):
        exporter.export(Scale(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="m.onnx does not end in .xml"):
        exporter.export(small(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="there is no input 'y' to rename"):
        exporter.export(small(), tmp_path, input_names={"y": "x"})

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(x)  # type: ignore[operator]
            return self.state * 2  # type: ignore[operator]

    with pytest.raises(ExportError, match="writes to state in place, and an OpenVINO model keeps no state"):
        exporter.export(torch.export.export(Writes(), (torch.ones(4),)).run_decompositions({}), tmp_path)

    class Gamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="OpenVINO .* cannot convert the program: .*; replace that operator"):
        exporter.export(torch.export.export(Gamma(), (torch.ones(4),)), tmp_path)

    class Unused(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 2 + 0 * 3

    ep = torch.export.export(Unused(), (torch.ones(4), torch.ones(4)))
    report = exporter.export(ep, tmp_path / "unused.xml")
    assert report.inputs == ("x", "y")


def test_a_damaged_file_and_wrong_inputs(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(ExportError, match="OpenVINO .* cannot load m.xml: "):
        CompiledModel(tmp_path / "m.xml")
    exporter.export(small(), tmp_path / "m.xml")
    model = CompiledModel(tmp_path / "m.xml")
    with pytest.raises(ExportError, match="OpenVINO cannot run the model: "):
        model.run([torch.zeros(2, 5)])
    with pytest.raises(ConfigError, match="takes x and returns .* cannot generate"):
        generate_openvino(model, [1], 1)
    with pytest.raises(ConfigError, match="there are 0 tokens to start from and 1 to make"):
        generate_openvino(model, [], 1)

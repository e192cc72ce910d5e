"""Mixtures of experts in ONNX Runtime: what torch computes, with one small product per expert and no gathered weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers torch.ops.transformers)
from torch import Tensor, nn
from torch.export import Dim

from spinpass import RotationConfig
from spinpass.errors import ExportError
from spinpass.exporters import cache_names
from spinpass.exporters.onnx import check_operators, export
from spinpass.folders import export as export_folder
from spinpass.folders import making
from spinpass.runtime import OrtDecoder
from tests.support import experts
from tests.support.folders import tokenizer
from tests.support.sweeps import quick


class Grouped(nn.Module):
    def __init__(self, transposed: bool, fixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed, self.fixed = transposed, fixed
        self.weight = nn.Parameter(torch.randn(4, 6, 5) if transposed else torch.randn(4, 5, 6))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight.transpose(1, 2) if self.transposed else self.weight
        if not self.fixed:
            weight = weight * rows.sum().sign()
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("fixed", [True, False], ids=["constant", "computed"])
def test_rows_meet_their_experts_matrix(transposed: bool, fixed: bool, tmp_path: Path) -> None:
    model = Grouped(transposed, fixed)
    ends = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    ep = torch.export.export(model, (torch.randn(9, 5), ends), dynamic_shapes={"rows": {0: Dim("n")}, "ends": None})
    report = export(ep, tmp_path, inputs=(torch.randn(9, 5), ends))
    assert report.certificate is not None and report.certificate.ok
    session = ort.InferenceSession(str(report.path))
    for each in ([2, 2, 7, 9], [0, 0, 0, 1], [3, 3, 3, 3]):
        ends = torch.tensor(each)
        rows = torch.randn(int(ends[-1]), 5)
        names = [i.name for i in session.get_inputs()]
        (got,) = session.run(None, dict(zip(names, (rows.numpy(), ends.to(torch.int32).numpy()))))
        np.testing.assert_allclose(got, model(rows, ends).detach().numpy(), atol=1e-5)
    graph = onnx.load(report.path).graph
    assert sum(n.op_type == "MatMul" for n in graph.node) == 4
    if fixed:
        assert not [i for i in graph.initializer if len(i.dims) == 3], "the stack is there beside its matrices"


def test_counts_are_those_of_histc(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.histc(x, bins=6, min=0, max=5), torch.histc(x, bins=3, min=-1, max=2)])

    x = torch.tensor([0.0, 1, 5, 5, 3, 2, -1, 7, 0.5, 4.99, 2.0, -0.5, 1.999])
    ep = torch.export.export(Counts(), (x,), dynamic_shapes=({0: Dim("n")},))
    report = export(ep, tmp_path, inputs=(x,))
    (got,) = ort.InferenceSession(str(report.path)).run(None, {"x": x.numpy()})
    assert got.tolist() == Counts()(x).tolist()


def folder(family: str, path: Path) -> Any:
    model = experts.build(family)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def expected(model: Any, ids: list[int], new: int) -> list[int]:
    given = torch.tensor([ids])
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", quick(experts.FAMILIES, only=["softmax first", "shared expert"]))
def test_folders_write_the_text_that_transformers_writes(family: str, tmp_path: Path) -> None:
    model = folder(family, tmp_path / "model")
    written = export_folder(tmp_path / "model", tmp_path / "out", RotationConfig(), bits=16)
    assert written.report.certificate.ok
    ids = torch.randint(3, 96, (17,), generator=torch.Generator().manual_seed(1)).tolist()
    got = OrtDecoder(tmp_path / "out").generate(ids, 16, end=[])
    assert list(got.tokens) == expected(model, ids, 16)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    stacks = [i.name for i in graph.initializer if len(i.dims) == 3]
    assert not stacks, "weights of all experts in one constant would be gathered or copied"
    assert "experts_implementation" not in (tmp_path / "out" / "config.json").read_text()
    if written.report.fused.attention:
        assert not written.report.fused.kept, "a router's Softmax was taken for an attention"


@pytest.mark.parametrize("family", quick(experts.FAMILIES, only=["softmax first", "shared expert"]))
@pytest.mark.parametrize("recipe", quick(["plain", "quick"], only=["quick"]))
def test_experts_have_their_integers(tmp_path: Path, family: str, recipe: str) -> None:
    """Each matrix of a stack is a product of its own; routers stay in floats. The folder was tried when it was made."""
    folder(family, tmp_path / "model")
    written = export_folder(tmp_path / "model", tmp_path / "out", RotationConfig(), recipe=recipe, calibration_windows=2 if recipe == "quick" else None)  # type: ignore[arg-type]
    told = written.manifest["quantization"]
    assert "it picks what comes next, and rounding would change which" in told["kept"].values()
    stacks = {name: told["weights"][name]["tokens"] for name in told["weights"] if ".experts." in name}
    assert stacks and not [name for name in told["weights"] if name.endswith("mlp.gate.weight")]
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    products = {node.input[1] for node in graph.node if node.op_type == "MatMulNBits"}
    count = experts.build(family).config.get_text_config()
    count = getattr(count, "num_local_experts", None) or getattr(count, "num_experts", None) or count.n_routed_experts
    for name, tokens in stacks.items():
        assert {f"{name}.{i}.q4" for i in range(count)} <= products, name
        assert len(tokens) == (count if recipe == "quick" else 0)
    assert not [i.name for i in graph.initializer if ".experts." in i.name and i.data_type == onnx.TensorProto.FLOAT and i.dims[-1] > 1 and "scales" not in i.name], "a matrix is left in floats"


def test_gathered_weights_would_be_seen(tmp_path: Path) -> None:
    """The product is broken on purpose: with the other implementation the stacks are in the file, to be gathered."""
    report = export(experts.program(2, "batched_mm"), tmp_path, **cache_names(experts.program(2, "batched_mm")), verify=False)
    assert [i.name for i in onnx.load(report.path).graph.initializer if len(i.dims) == 3]


def test_an_operator_without_translation_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder("softmax first", tmp_path / "model")
    monkeypatch.setattr("spinpass.exporters.onnx.translate.expert_translations", dict)
    monkeypatch.setattr(making, "rotated", lambda *a, **k: pytest.fail("it was rotated first"))
    with pytest.raises(ExportError, match=r"no translation of transformers::grouped_mm_fallback \(grouped_mm_fallback\): export the model to another runtime"):
        export_folder(tmp_path / "model", tmp_path / "out", RotationConfig(), bits=16)
    assert not (tmp_path / "out").exists()


def test_complex_values_are_named_before_the_work() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x).unsqueeze(0))

    ep = torch.export.export(Turned(), (torch.randn(3, 2),))
    with pytest.raises(ExportError, match="no translation of aten::unsqueeze on complex values"):
        check_operators(ep)


def test_what_torch_decomposes_or_asserts_passes() -> None:
    class Fine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y.add_(1)
            torch._check(x.shape[0] > 1)
            return torch.ops.spinpass.hadamard(torch.nn.functional.silu(y), 4)

    check_operators(torch.export.export(Fine(), (torch.randn(3, 4),), dynamic_shapes=({0: Dim("n")},)))

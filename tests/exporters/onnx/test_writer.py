"""ONNX export: stock ONNX Runtime computes what the program computes; the online Hadamards stay visible in the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spinpass import record
from spinpass.certificate import files as file_certificate
from spinpass.errors import ConfigError, ExportError, ProgramError, VerificationError
from spinpass.exporters import certified_file
from spinpass.exporters import names as onnx_names
from spinpass.exporters.onnx import certificate as onnx_certificate
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.operators import hadamard as onnx_functions
from spinpass.formats import staging as files
from spinpass.operators import hadamard as library
from spinpass.rotations import rotation
from spinpass.rotations.hadamard import factor_matrices

hadamard = torch.ops.spinpass.hadamard


class Block(nn.Module):
    """linear, online Hadamard, linear; every parameter random."""

    def __init__(self, size: int, order: int, *, transpose: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(size)
        self.first, self.second = nn.Linear(8, size, dtype=dtype), nn.Linear(size, 5, dtype=dtype)
        self.order, self.transpose = order, transpose

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = hadamard(self.first(x), self.order, self.transpose)
        return {"hidden": hidden, "result": self.second(hidden)}


class Apply(nn.Module):
    """The forward of a plain function."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def program(size: int = 24, order: int = 12, *, dynamic: bool = False, **options: Any) -> ExportedProgram:
    x = torch.randn(2, 3, 8, dtype=options.get("dtype", torch.float32))
    axes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(Block(size, order, **options), (x,), dynamic_shapes=axes)


def traced(function: Callable[..., Any], *args: Tensor, **parameters: Tensor) -> ExportedProgram:
    return torch.export.export(Apply(function, **parameters), args)


def run(path: Path, *values: Tensor) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)})


# -- the Hadamard in the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("shape", "order"),
    [((7,), 1), ((12,), 12), ((3, 20), 20), ((2, 3, 36), 12), ((2, 3, 24), 12), ((2, 3, 4, 64), 64), ((2, 1536), 1536),
     ((2, 3072), 1536), ((3, 96 * 48), 4608), ((2, 2, 3, 5, 40), 20)],
)  # fmt: skip
def test_runtime_agrees_with_the_dense_product(
    shape: tuple[int, ...], order: int, transpose: bool, tmp_path: Path
) -> None:
    x = torch.randn(shape)
    ep = traced(lambda _, v: hadamard(v, order, transpose), x)
    report = exporter.export(ep, tmp_path / "m.onnx", verify=False)
    (y,) = run(report.path, x)
    expected = library.reference(x.double(), order, transpose).numpy()
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max() + 1e-6


def test_some_tested_order_has_a_matrix_that_is_not_symmetric() -> None:
    x = torch.randn(2, 12, dtype=torch.float64)
    assert (library.reference(x, 12) - library.reference(x, 12, True)).abs().max() > 0.1


def test_hadamards_are_called_by_name_and_have_a_body_of_standard_ops(tmp_path: Path) -> None:
    report = exporter.export(program(36, 12, transpose=True), tmp_path / "m.onnx")
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    calls = [node for node in proto.graph.node if node.domain == "spinpass"]
    assert report.hadamards == len(calls) == 1
    assert calls[0].op_type == "Hadamard_12x3_transposed_rank3_float"
    assert {a.name: a.i for a in calls[0].attribute} == {"order": 12, "transpose": 1}
    (function,) = proto.functions
    assert (function.domain, function.name) == ("spinpass", calls[0].op_type)
    assert {node.op_type for node in function.node} == {"Reshape", "Constant", "MatMul"}
    assert {(o.domain, o.version) for o in proto.opset_import} >= {("spinpass", 1)}
    assert {p.key: p.value for p in proto.metadata_props}["spinpass.hadamards"] == "1"


def test_a_hadamard_of_constants_is_not_folded_away(tmp_path: Path) -> None:
    ep = traced(lambda m, x: x + hadamard(m.w, 4), torch.randn(2, 4), w=torch.randn(4))
    assert exporter.export(ep, tmp_path / "m.onnx").hadamards == 1


def test_equal_hadamards_share_one_function(tmp_path: Path) -> None:
    ep = traced(lambda _, x: hadamard(hadamard(hadamard(x, 4).relu(), 4).relu(), 4, True), torch.randn(2, 4))
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert report.hadamards == 3
    assert len(ir.load(report.path).functions) == 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.float16, 4e-3)])
def test_dtypes(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    report = exporter.export(program(dtype=dtype), tmp_path / "m.onnx")
    assert report.certificate is not None and report.certificate.dtype is dtype
    assert report.certificate.worst.difference.relative < bound


def test_half_types_are_computed_in_float32(tmp_path: Path) -> None:
    x = 300 * torch.ones(1, 576, dtype=torch.float16)  # a plain float16 sum of 576 of them would overflow
    ep = traced(lambda _, v: hadamard(v, 576), x)
    report = exporter.export(ep, tmp_path / "m.onnx")
    (y,) = run(report.path, x)
    assert np.isfinite(y).all() and report.certificate is not None


def test_bfloat16_hadamard_runs(tmp_path: Path) -> None:
    ep = traced(lambda _, v: hadamard(v, 12), torch.randn(3, 12, dtype=torch.bfloat16))
    report = exporter.export(ep, tmp_path / "m.onnx", verify=True)
    assert report.certificate is not None and report.certificate.dtype is torch.bfloat16


def test_dynamic_axes_stay_dynamic(tmp_path: Path) -> None:
    ep = program(36, 12, dynamic=True)
    report = exporter.export(ep, tmp_path / "m.onnx")
    for shape in ((2, 3, 8), (5, 9, 8), (1, 1, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = Block(36, 12)(x)
        for found, wanted in zip(run(report.path, x), expected.values(), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)
    assert all(isinstance(size, str) for size in ort.InferenceSession(report.path).get_inputs()[0].shape[:2])


@pytest.mark.parametrize("order", [4, 12])
def test_blocks_may_be_of_any_number(tmp_path: Path, order: int) -> None:
    """The size of the axis is then an expression of dynamic sizes."""
    model = Apply(lambda _, x: hadamard(x, order))
    ep = torch.export.export(model, (torch.randn(2, 36),), dynamic_shapes=(({1: order * Dim("blocks", min=2)},),))
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert report.hadamards == 1
    for blocks in (2, 5):
        x = torch.randn(2, blocks * order)
        (found,) = run(report.path, x)
        np.testing.assert_allclose(found, hadamard(x, order).numpy(), atol=2e-6)


# -- translation ------------------------------------------------------------------------------------------------------


def test_the_program_is_not_changed(tmp_path: Path) -> None:
    ep = program(dynamic=True)
    before, weights = str(ep), {k: (v.data_ptr(), v.clone()) for k, v in ep.state_dict.items()}
    exporter.export(ep, tmp_path / "m.onnx")
    assert str(ep) == before
    for name, tensor in ep.state_dict.items():
        assert tensor.data_ptr() == weights[name][0] and torch.equal(tensor, weights[name][1])


def test_ops_written_in_place_are_decomposed(tmp_path: Path) -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2].add_(1.0)  # reaches y through a view
        return hadamard(y, 4)

    report = exporter.export(traced(forward, torch.randn(3, 4)), tmp_path / "m.onnx")
    assert report.certificate is not None and report.certificate.ok


def test_ops_without_a_translation_are_decomposed(tmp_path: Path) -> None:
    ep = traced(lambda _, x: hadamard(x.T, 4), torch.randn(4, 3))
    assert "numpy_T" in str(ep.graph)
    assert exporter.export(ep, tmp_path / "m.onnx").hadamards == 1


def test_a_decomposed_program_exports_alike(tmp_path: Path) -> None:
    report = exporter.export(program().run_decompositions(), tmp_path / "m.onnx")
    assert report.hadamards == 1 and report.certificate is not None


def test_constants_in_one_storage_are_stored_once(tmp_path: Path) -> None:
    table = torch.randn(100, 128)
    ep = traced(
        lambda m, i: nn.functional.embedding(i, m.a) @ m.b.t(),
        torch.tensor([[1, 2], [3, 4]]),
        a=table,
        b=table.detach(),
    )
    report = exporter.export(ep, tmp_path / "m.onnx")
    big = [v for v in ir.load(report.path).graph.initializers.values() if v.const_value.nbytes >= table.nbytes]  # type: ignore[union-attr]
    assert len(big) == 1 and report.certificate is not None


def test_reshapes_that_change_nothing_are_dropped(tmp_path: Path) -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        same = x.relu().reshape(x.shape[0], x.shape[1], 8)
        return same.tanh().reshape(x.shape[0], x.shape[1], 2, 4)

    ep = torch.export.export(
        Apply(forward), (torch.randn(2, 3, 8),), dynamic_shapes=(({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),)
    )
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert [node.op_type for node in ir.load(report.path).graph].count("Reshape") == 1
    assert report.certificate is not None


def test_the_opset_can_be_chosen(tmp_path: Path) -> None:
    assert exporter.export(program(), tmp_path / "m.onnx", opset=21).opset == 21


def test_not_a_program() -> None:
    with pytest.raises(ProgramError, match=r"takes a torch.export.ExportedProgram, got Block"):
        exporter.export(Block(24, 12), "m.onnx")  # type: ignore[arg-type]


def test_an_op_that_onnx_lacks(tmp_path: Path) -> None:
    ep = traced(lambda _, x: torch.linalg.qr(x)[0], torch.randn(3, 3))
    with pytest.raises(
        ExportError, match=r"cannot translate the program: No ONNX function found.*linalg_qr.*replace that op"
    ):
        exporter.export(ep, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)  # type: ignore[operator]
        return x + self.count  # type: ignore[operator]


def test_state_written_in_place_is_refused(tmp_path: Path) -> None:
    ep = torch.export.export(Counter(), (torch.randn(4),))
    with pytest.raises(ExportError, match=r"writes to count in place.*as inputs and outputs"):
        exporter.export(ep, tmp_path / "m.onnx")


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    ep = program()
    mode = next(iter(ep.graph.nodes)).meta["val"].fake_mode
    ep.state_dict["first.weight"] = mode.from_tensor(ep.state_dict["first.weight"])
    with pytest.raises(ExportError, match=r"first.weight is a FakeTensor, not a tensor with values: load the weights"):
        exporter.export(ep, tmp_path / "m.onnx")


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_come_from_the_signature(tmp_path: Path) -> None:
    report = exporter.export(program(), tmp_path / "m.onnx")
    assert (report.inputs, report.outputs) == (("x",), ("hidden", "result"))
    session = ort.InferenceSession(report.path)
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["hidden", "result"]


def test_outputs_without_keys_have_the_names_of_their_nodes() -> None:
    ep = traced(lambda _, x: (x.relu(), x.tanh()), torch.randn(2))
    assert onnx_names.signature_names(ep).outputs == ["relu", "tanh"]


def test_an_output_that_is_called_like_an_input_and_one_that_is_an_input(tmp_path: Path) -> None:
    ep = traced(lambda _, x, y: {"args_0": x + y, "same": y, "none": None}, torch.randn(2), torch.randn(2))
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert report.inputs == ("args_0", "args_1")
    assert report.outputs == ("output.args_0", "same")
    assert report.certificate is not None and [o.name for o in report.certificate.outputs] == list(report.outputs)


def test_names_can_be_given(tmp_path: Path) -> None:
    report = exporter.export(program(), tmp_path / "m.onnx", input_names=["pixels"], output_names={"result": "logits"})
    assert (report.inputs, report.outputs) == (("pixels",), ("hidden", "logits"))
    assert run(report.path, torch.randn(2, 3, 8))[1].shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": {"y": "z"}}, "no input 'y' to rename; the inputs are x"),
        ({"output_names": ["a"]}, "output_names: 1 names for the 2 outputs hidden, result"),
        ({"input_names": "x"}, "input_names: 'x' for the 1 inputs x"),
        ({"output_names": ["x", "b"]}, "two inputs or outputs would have the name 'x'"),
    ],
)
def test_names_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        exporter.export(program(), tmp_path / "m.onnx", **options)


def cached(m: Any, x: Tensor, past_key_values: list[Tensor]) -> dict[str, Any]:
    key, value = past_key_values
    keys, values = torch.cat([key, x], 1), torch.cat([value, x * 2], 1)
    seen = torch.nn.functional.scaled_dot_product_attention(x[:, None], keys[:, None], values[:, None])[:, 0]
    return {"logits": seen, "past_key_values": [keys, values]}


class Cached(nn.Module):
    def forward(self, x: Tensor, past_key_values: list[Tensor]) -> dict[str, Any]:
        return cached(self, x, past_key_values)


def test_cache_names() -> None:
    ep = torch.export.export(Cached(), (torch.randn(2, 1, 3), [torch.randn(2, 4, 3), torch.randn(2, 4, 3)]))
    assert onnx_names.cache_names(ep) == {
        "input_names": {"past_key_values_0": "past_key_values.0.key", "past_key_values_1": "past_key_values.0.value"},
        "output_names": {
            "output.past_key_values_0": "present.0.key",
            "output.past_key_values_1": "present.0.value",
        },
    }


def test_a_program_without_a_cache_has_no_cache_names() -> None:
    assert onnx_names.cache_names(program()) == {"input_names": {}, "output_names": {}}


def test_the_record_of_a_rotated_program_is_kept(tmp_path: Path) -> None:
    ep = torch.export.export(Cached(), (torch.randn(2, 1, 3), [torch.randn(2, 4, 3), torch.randn(2, 4, 3)]))
    carried = record.Carried(rotation.Rotation.create("random-matrix", 3), -1, "values")
    record.write(ep.graph, record.Record("1", {"past_key_values_1": carried}, {2: carried}))
    report = exporter.export(ep, tmp_path / "m.onnx", metadata={"note": "n"}, **onnx_names.cache_names(ep))
    metadata = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    found = record.Record.from_dict(json.loads(metadata["spinpass.record"]) | {"outputs": {}})
    assert metadata["note"] == "n"
    assert found.inputs == {"past_key_values.0.value": carried}
    assert list(json.loads(metadata["spinpass.record"])["outputs"]) == ["present.0.value"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_gets_model_onnx(tmp_path: Path) -> None:
    report = exporter.export(program(), tmp_path / "new" / "folder")
    assert report.files == (tmp_path / "new" / "folder" / "model.onnx",)
    assert report.bytes == report.path.stat().st_size
    assert json.loads(json.dumps(report.to_dict()))["certificate"]["ok"] is True


def test_external_data_by_choice_and_by_size(tmp_path: Path) -> None:
    for options in ({"external_data": True}, {"external_threshold": 100}):
        report = exporter.export(program(96), tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
        assert [file.name for file in report.files] == ["m.onnx", "m.onnx.data"]
        assert report.bytes == sum(file.stat().st_size for file in report.files)
        assert all(file.stat().st_nlink == 1 for file in report.files)
        onnx.checker.check_model(str(report.path))
        assert report.certificate is not None
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


def test_data_of_an_older_model_is_removed(tmp_path: Path) -> None:
    exporter.export(program(96), tmp_path / "m.onnx", external_data=True)
    exporter.export(program(96), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_one_file_cannot_hold_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PROTOBUF_LIMIT", 100)
    with pytest.raises(ConfigError, match=r"one ONNX file cannot hold [\d,]+ bytes of weights: leave external_data"):
        exporter.export(program(), tmp_path / "m.onnx", external_data=False)
    assert os.listdir(tmp_path) == []


def failing_save(number: int) -> Callable[..., None]:
    def save(model: ir.Model, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half a model")
        raise OSError(number, os.strerror(number))

    return save


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "check the path"),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(number: int, advice: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(ir, "save", failing_save(number))
    with pytest.raises(ExportError, match=f"cannot write to .*{advice}.*nothing was written"):
        exporter.export(program(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 8, 2))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"bytes are needed and 2 are free \(the disk is full"):
        exporter.export(program(), tmp_path / "new" / "m.onnx")
    assert not (tmp_path / "new" / "m.onnx").exists()
    assert not (tmp_path / "new").exists()


def test_a_file_limit_of_the_system(tmp_path: Path) -> None:
    import resource
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ep = program(96)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ExportError, match="larger than this file system or this user's limit"):
            exporter.export(ep, tmp_path / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_a_read_only_folder() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which another user cannot reach
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(ExportError, match="not writable for this user"), files.staged(folder):
            pass
    finally:
        if root:
            os.seteuid(0)
        folder.rmdir()


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ExportError, match=r"Permission denied \(the folder is not writable.*nothing was written"):
        exporter.export(program(), tmp_path / "new" / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="a part of the path is a file"):
        exporter.export(program(), tmp_path / "taken" / "m.onnx")


def test_a_folder_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="a folder of that name is in the way"):
        exporter.export(program(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_rename_that_fails_puts_the_old_files_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old a")
    (tmp_path / "b").mkdir()  # the second rename cannot replace a folder
    with pytest.raises(ExportError, match="a folder of that name is in the way"), files.staged(tmp_path) as staging:
        (staging / "a").write_text("new a")
        (staging / "b").write_text("new b")
    assert (tmp_path / "a").read_text() == "old a"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# -- the certificate --------------------------------------------------------------------------------------------------


def test_the_certificate_compares_every_output(tmp_path: Path) -> None:
    report = exporter.export(program(), tmp_path / "m.onnx")
    certificate = report.certificate
    assert certificate is not None and certificate.ok and not report.uncertified
    assert [(o.name, o.shape, o.difference.argmax) for o in certificate.outputs] == [
        ("hidden", (2, 3, 24), 1.0),
        ("result", (2, 3, 5), 1.0),
    ]
    assert certificate.inputs == ("x float32[2, 3, 8]",)
    assert certificate.verdict.startswith("equivalent: at worst ")
    assert set(report.seconds) == {"translate", "write", "certify"}


def test_a_program_without_outputs_and_one_with_whole_numbers(tmp_path: Path) -> None:
    empty = file_certificate.FileCertificate((), torch.float32, (), onnx_certificate.KIND)
    assert empty.ok and empty.verdict == "equivalent: the program has no outputs"
    ep = traced(lambda _, i: {"i": i * 2}, torch.tensor([1, 2]))
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert report.certificate is not None and report.certificate.outputs[0].bound == 0


def sabotage(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], list[Any]]) -> None:
    """Write function bodies for other arguments (name, order, blocks, rank, dtype, transpose, opset) than are right."""
    original = onnx_functions._function
    monkeypatch.setattr(onnx_functions, "_function", lambda *args: original(*change(list(args))))


def flip(args: list[Any]) -> list[Any]:
    return [*args[:5], not args[5], *args[6:]]


def test_a_wrong_transpose_is_caught_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, flip)
    with pytest.raises(
        VerificationError, match=r"does not compute what the program computes: NOT equivalent: (hidden|result): "
    ):
        exporter.export(program(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_wrong_blocks_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda args: [args[0], args[1] * args[2], 1, *args[3:]])
    with pytest.raises(VerificationError, match="NOT equivalent"):
        exporter.export(program(24, 12), tmp_path / "m.onnx")


def test_factors_in_the_wrong_order_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = SimpleNamespace(factor_matrices=lambda *args: factor_matrices(*args)[::-1])
    monkeypatch.setattr(onnx_functions, "hadamard", swapped)
    with pytest.raises(VerificationError, match="NOT equivalent"):
        exporter.export(program(1536, 1536), tmp_path / "m.onnx")


def test_switched_off_and_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = exporter.export(program(), tmp_path / "m.onnx", verify=False)
    assert report.certificate is None and report.uncertified == "switched off"
    monkeypatch.setattr(certified_file, "CERTIFY_BYTES", 10)
    report = exporter.export(program(), tmp_path / "m.onnx")
    assert report.certificate is None and "above the limit of 10: pass verify=True" in report.uncertified
    assert exporter.export(program(), tmp_path / "m.onnx", verify=True).certificate is not None


def test_a_type_that_the_runtime_has_no_kernel_for(tmp_path: Path) -> None:
    ep = traced(lambda _, x: torch.tanh(hadamard(x, 4)), torch.randn(2, 4, dtype=torch.bfloat16))
    report = exporter.export(ep, tmp_path / "m.onnx")
    assert report.certificate is None and "lacks a kernel on CPUExecutionProvider" in report.uncertified
    with pytest.raises(ExportError, match=r"lacks a kernel on CPUExecutionProvider: .*Tanh"):
        exporter.export(ep, tmp_path / "other.onnx", verify=True)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_own_inputs(tmp_path: Path) -> None:
    report = exporter.export(program(dynamic=True), tmp_path / "m.onnx", inputs=(torch.randn(4, 6, 8),))
    assert report.certificate is not None and report.certificate.inputs == ("x float32[4, 6, 8]",)
    static = exporter.export(program(), tmp_path / "static.onnx")
    with pytest.raises(ExportError, match=r"cannot run the model: .*Got invalid dimensions"):
        onnx_certificate.certify_onnx(program(dynamic=True), static.path, (torch.randn(4, 6, 8),))


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"cannot load m.onnx"):
        onnx_certificate.certify_onnx(program(), tmp_path / "m.onnx")


def test_an_output_without_a_finite_value_is_no_proof() -> None:
    nothing = torch.full((2, 3), float("nan"))
    found = [file_certificate.compare_output("y", x, x, 1e-4, lambda: None) for x in (nothing, torch.ones(2, 3))]
    certificate = file_certificate.FileCertificate((found[0],), torch.float32, (), onnx_certificate.KIND)
    assert not certificate.ok and "no value of it is finite" in certificate.verdict
    with pytest.raises(VerificationError, match="nothing was compared"):
        certificate.raise_if_failed()
    assert file_certificate.worst_of_runs(found).ok, "another run has compared it"
    assert not file_certificate.worst_of_runs(found[:1]).ok


def test_errors_that_are_not_finite_become_text() -> None:
    reference, result = torch.tensor([[1.0]]), torch.tensor([[float("nan")]])
    output = file_certificate.compare_output("y", reference, result, 1e-4, lambda: None)
    certificate = file_certificate.FileCertificate((output,), torch.float32, (), onnx_certificate.KIND)
    assert not certificate.ok
    assert json.loads(json.dumps(certificate.to_dict()))["outputs"][0]["max_abs_error"] == "inf"

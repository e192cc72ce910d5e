"""Which dtypes ONNX Runtime computes in on a CPU: asked of the runtime itself, with one small product of each."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import TensorProto, helper
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ExportError
from spinpass.graph import value
from spinpass.runtime import NoKernelError, open_session

_TYPES = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


def check_kernels(ep: ExportedProgram) -> None:
    """Look whether ONNX Runtime multiplies matrices on a CPU in the dtypes that the program's values have.

    Raises:
        ExportError: it has no kernel for one of them, which is so of bfloat16; the message names operator and dtype.
    """
    check_dtypes(
        {str(v.dtype).removeprefix("torch.") for node in ep.graph.nodes if isinstance(v := value(node), Tensor)}
    )


def check_dtypes(found: Set[str]) -> None:
    """Look whether ONNX Runtime multiplies matrices on a CPU in the dtypes of these names, such as ``bfloat16``.

    Raises what :func:`check_kernels` raises.
    """
    for dtype in sorted(found & _TYPES.keys()):
        with TemporaryDirectory() as folder:
            path = Path(folder, "product.onnx")
            onnx.save(_product(_TYPES[dtype]), path)
            try:
                open_session(path)
            except NoKernelError as error:
                raise ExportError(
                    f"ONNX Runtime has no kernel for MatMul in {dtype} on a CPU, so the folder could neither be "
                    "certified nor run here: export with --dtype float32 or float16, or with --no-verify for a runtime "
                    "that has one"
                ) from error


def _product(dtype: int) -> onnx.ModelProto:
    """Return a model of one MatMul."""
    x, w, y = (helper.make_tensor_value_info(name, dtype, [2, 2]) for name in ("x", "w", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x, w], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

"""The face of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spinpass.runtime


def test_no_runtime_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys\nfor m in ('onnx', 'onnxruntime', 'openvino', 'executorch'): sys.modules[m] = None\n"
        "import spinpass.runtime as r\nprint(r.OrtDecoder.__name__, r.CompiledModel.__name__)\n"
        "import spinpass.exporters.openvino"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0 and done.stdout.split() == ["OrtDecoder", "CompiledModel"], done.stderr


def test_names_come_from_the_modules_behind() -> None:
    from spinpass.runtime import onnx_session

    assert spinpass.runtime.run_session is onnx_session.run_session
    assert spinpass.runtime.NoKernelError is onnx_session.NoKernelError
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = spinpass.runtime.nothing

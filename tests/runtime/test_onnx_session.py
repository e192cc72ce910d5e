"""What needs ONNX Runtime asks for it when it is called, so that the rest of the package works without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import spinpass

WITHOUT = "import sys\nfor m in ('onnxruntime', 'openvino', 'executorch', 'transformers'): sys.modules[m] = None\n"


def test_the_runtimes_are_imported_when_they_are_asked_for() -> None:
    code = f"{WITHOUT}import spinpass.runtime, spinpass.cli.app\nprint(spinpass.runtime.Sampling().top_p)"
    root = Path(spinpass.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "1.0", done.stderr

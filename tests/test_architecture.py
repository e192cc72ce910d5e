"""Rules of the code base that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import spinpass

PACKAGE = Path(spinpass.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [f for f in FILES if "exporters" not in f.relative_to(PACKAGE).parts]
NAMES = (
    "llama",
    "qwen",
    "gemma",
    "mistral",
    "mixtral",
    "phi3",
    "phi-3",
    "gpt2",
    "gpt-2",
    "gpt_neox",
    "gptneox",
    "gptj",
    "opt-",
    "falcon",
    "starcoder",
    "stablelm",
    "olmo",
    "cohere",
    "granite",
    "bloom",
    "codegen",
    "deepseek",
    "smollm",
    "t5-",
    "bert",
    "whisper",
)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_names_no_model(path: Path) -> None:
    found = [w for w in NAMES if re.search(rf"(?<![a-z]){re.escape(w)}", path.read_text().lower())]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_have_a_purpose_and_a_docstring(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert path.read_text().lstrip().startswith(('"""', "'''", 'r"""')), f"{path} has no docstring"


PRIVATE = re.compile(
    r"torch\.(_[a-z]\w*|\w+\._[a-z]\w*)|(?<!self)(?<!cls)\._(?!_)(schema|dynamo|export|graph_module_flat|verifier)\b"
)


@pytest.mark.parametrize("path", [f for f in CORE if f.parent.name != "graph"], ids=name)
def test_only_one_file_touches_private_torch_api(path: Path) -> None:
    code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
    found = [m.group() for m in PRIVATE.finditer(code)]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_needs_torch_alone(path: Path) -> None:
    optional = {"pictures.py"} | {f.name for f in (PACKAGE / "cli").glob("*.py")} | {"onnx_session.py"}
    found = re.findall(
        r"^(?:import|from) (numpy|transformers|onnx\w*|typer|rich|safetensors|gguf|matplotlib)\b",
        path.read_text(),
        re.M,
    )
    assert not found or path.name in optional, f"{path}: {found}"


def test_modules_import_without_the_extras() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfor m in ('transformers','onnx','onnxscript','onnxruntime','typer','rich','numpy_'): sys.modules[m] = None\n"
        "import spinpass, spinpass.record, spinpass.operators.hadamard\nprint(len(spinpass.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_api() -> None:
    assert sorted(spinpass.__all__) == [
        "Certificate",
        "ConfigError",
        "ExportError",
        "InvariantError",
        "Override",
        "ProgramError",
        "QuantizedWeightError",
        "RefusedError",
        "Rotation",
        "RotationConfig",
        "RotationPlan",
        "SpinpassError",
        "VerificationError",
        "plan",
        "transform",
        "verify",
    ]
    assert all(hasattr(spinpass, n) for n in spinpass.__all__)
    assert all(getattr(spinpass, n).__doc__ for n in spinpass.__all__)


def test_every_error_is_of_the_family() -> None:
    errors = [getattr(spinpass, n) for n in spinpass.__all__ if n.endswith("Error")]
    assert all(issubclass(e, spinpass.SpinpassError) for e in errors)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_bare_exceptions_and_no_machine_paths(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"raise Exception\(|except:\s*$|except BaseException", text, re.M)
    assert not re.search(r"/tmp/|/work/|/root/", text)

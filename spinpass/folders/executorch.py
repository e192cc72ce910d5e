"""A folder that ExecuTorch runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from spinpass.errors import ExportError
from spinpass.loading import LoadedModel
from spinpass.progress import Steps

from .companions import Written, write_companions
from .result import Result


def write_pte_folder(
    executorch: SimpleNamespace,
    loaded: LoadedModel,
    result: Result,
    out: Path,
    steps: Steps,
    *,
    certify: bool = True,
) -> Written:
    """Export for ExecuTorch, and put beside the file what belongs to the model.

    Raises ExportError, ConfigError, VerificationError: as :func:`spinpass.exporters.executorch.export`.
    """
    report = executorch.export(
        result.exportable, out, verify=certify, progress=lambda step: steps.begin(f"executorch: {step}")
    )
    files = [path.name for path in report.files]
    return Written(report, *write_companions(loaded, result, {"executorch": report.to_dict()}, files, out))


def executorch_tools() -> SimpleNamespace:
    """What writes for ExecuTorch, imported when it is needed."""
    try:
        from spinpass.exporters import executorch
    except ModuleNotFoundError as error:
        raise ExportError(f"writing for ExecuTorch needs {error.name}: pip install 'spinpass[executorch]'") from error
    return SimpleNamespace(export=executorch.export)

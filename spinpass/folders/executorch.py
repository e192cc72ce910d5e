"""A folder that ExecuTorch runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spinpass.errors import ExportError
from spinpass.formats import Draft
from spinpass.loading import LoadedModel
from spinpass.progress import Steps

from .card import Card, scored_card
from .companions import Written, write_companions
from .judge import KERNEL_BOUND
from .result import Result
from .trial import try_folder, unjudged

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from spinpass.exporters.executorch import PteReport
    from spinpass.quantization import Quantized


class ExecutorchTools(Protocol):
    """This is what a folder needs of :mod:`spinpass.exporters.executorch`, which :func:`executorch_tools` imports."""

    def export(
        self,
        program: ExportedProgram | Quantized,
        path: Path,
        /,
        *,
        verify: bool,
        progress: Callable[[str], None],
    ) -> PteReport: ...


def write_pte_folder(
    executorch: ExecutorchTools,
    loaded: LoadedModel,
    result: Result,
    draft: Draft,
    steps: Steps,
    *,
    certify: bool = True,
) -> Written:
    """Export for ExecuTorch, and put beside the file what belongs to the model.

    Raises ExportError, ConfigError and VerificationError where :func:`spinpass.exporters.executorch.export` does.
    """
    report = draft.in_place(
        executorch.export(
            result.exportable, draft.folder, verify=certify, progress=lambda step: steps.begin(f"executorch: {step}")
        )
    )
    files = [path.name for path in report.files]
    program = result.scored or result.program
    bound, why = KERNEL_BOUND if result.rounds_activations else None, unjudged(program, certify=certify)
    tried = partial(try_folder, loaded, program, draft.folder, steps, bound=bound, why=why)

    def scored() -> Card | str | None:
        return scored_card(loaded, draft.folder, steps) if result.quantization is not None else None

    about = write_companions(loaded, result, {"executorch": report.to_dict()}, files, draft, tried, scored)
    return Written(report, *about, loading=loaded.report)


def executorch_tools() -> ExecutorchTools:
    """Import what writes for ExecuTorch, when it is needed. Raises ExportError where a package is missing."""
    try:
        from spinpass.exporters import executorch
    except ModuleNotFoundError as error:
        raise ExportError(f"writing for ExecuTorch needs {error.name}: pip install 'spinpass[executorch]'") from error
    return executorch

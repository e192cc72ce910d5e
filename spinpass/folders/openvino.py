"""A folder that OpenVINO runs, named as optimum names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spinpass.exporters import cache_names, named_record
from spinpass.formats import Draft
from spinpass.loading import LoadedModel
from spinpass.progress import Steps

from .card import Card, scored_card
from .companions import Written, write_companions
from .judge import KERNEL_BOUND, FolderTrial
from .result import Result
from .trial import try_folder, try_unrounded, unjudged

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from spinpass.exporters.openvino import OpenVINOReport
    from spinpass.quantization import Quantized


class OpenVINOTools(Protocol):
    """This is what a folder needs of :mod:`spinpass.exporters.openvino`, which :func:`openvino_tools` imports."""

    def export(
        self,
        program: ExportedProgram | Quantized,
        path: Path,
        /,
        *,
        input_names: Mapping[str, str],
        output_names: Mapping[str, str],
        verify: bool | None,
        progress: Callable[[str], None],
    ) -> OpenVINOReport: ...


def write_openvino_folder(
    openvino: OpenVINOTools,
    loaded: LoadedModel,
    result: Result,
    draft: Draft,
    steps: Steps,
    *,
    certify: bool = True,
) -> Written:
    """Export for OpenVINO, put beside the model what belongs to it, and try the folder.

    Where weights are integers OpenVINO rounds activations as it runs: the folder is tried like that, and again without.

    Raises ExportError, ConfigError and VerificationError where :func:`spinpass.exporters.openvino.export` or
    :func:`.trial.try_folder` does.
    """
    report = openvino.export(
        result.exportable,
        draft.folder,
        **cache_names(result.program),
        verify=None if certify else False,
        progress=lambda step: steps.begin(f"openvino: {step}"),
    )
    report = draft.in_place(report)
    program = result.scored or result.program
    why = unjudged(program, certify=certify)

    def tried() -> list[FolderTrial]:
        if not report.integers:
            return try_folder(loaded, program, draft.folder, steps, why=why)
        found = try_folder(loaded, program, draft.folder, steps, bound=KERNEL_BOUND, why=why)
        if why:
            return found
        return [*found, *try_unrounded(loaded, program, draft.folder, steps, runtime="openvino, unrounded")]

    def scored() -> Card | str | None:
        return scored_card(loaded, draft.folder, steps) if result.quantization is not None else None

    files = [path.name for path in report.files]
    told: dict[str, Any] = report.to_dict() | {"path": report.path.name, "files": files}  # a folder may be moved
    made = {"openvino": told, "record": named_record(result.program, report.inputs, report.outputs)}
    about = write_companions(loaded, result, made, files, draft, tried, scored)
    return Written(report, *about, loading=loaded.report)


def openvino_tools() -> OpenVINOTools:
    """Import what writes for OpenVINO, when it is needed. Raises ExportError where the package is missing."""
    from spinpass.exporters import openvino
    from spinpass.runtime import import_openvino

    import_openvino()
    return openvino

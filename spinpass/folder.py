"""From a loaded model to a folder that ONNX Runtime or ExecuTorch runs: rotate, certify, quantize, export, pack, what
lies beside."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from torch.export import ExportedProgram

from . import record
from .config import RotationConfig
from .console import Steps
from .errors import ConfigError, ExportError
from .exporters.files import staged
from .exporters.loading import LoadedModel
from .planning import RotationPlan
from .quantization import QuantizationReport, Quantized, quantize
from .scoring import token_ids
from .texts import calibration_inputs
from .transform import plan, transform

_PACKAGES = ("spinpass", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "executorch")


@dataclass(frozen=True)
class Result:
    """A program and how it came about; without a plan where nothing was asked for."""

    program: ExportedProgram
    plan: RotationPlan | None = None
    quantization: QuantizationReport | None = None

    @property
    def exportable(self) -> ExportedProgram | Quantized:
        """With its integers, where there are any."""
        return self.program if self.quantization is None else Quantized(self.program, self.quantization)

    @property
    def certificate(self) -> dict[str, Any] | None:
        """As the program's record holds it; None where it was not certified."""
        found = record.read(self.program)
        return found.certificate if found is not None else None

    def to_dict(self) -> dict[str, Any]:
        found = record.read(self.program)
        return {
            "versions": {name: version_of(name) for name in _PACKAGES} | {"python": platform.python_version()},
            "plan": self.plan and self.plan.to_dict(),
            "record": found and found.to_dict(),
            "quantization": self.quantization and self.quantization.to_dict(),
        }


def rotated(program: ExportedProgram, config: RotationConfig | None, steps: Steps, *, certify: bool = True) -> Result:
    """Plan, rotate and certify; the program as it is without a configuration. Raises what ``transform`` does."""
    if config is None:
        return Result(program)
    config = replace(config, verify=certify)
    steps.start("plan")
    decided = plan(program, config)
    tick = steps.start("rotate")

    def progress(done: int, total: int) -> None:
        tick(done, total)
        if done == total and certify:
            steps.start("certify")

    return Result(transform(program, plan=decided, progress=progress), decided)


def quantized(result: Result, loaded: LoadedModel, scheme: str, text: Path | None, steps: Steps) -> Result:
    """Calibrate on the text where there is one, and quantize. ConfigError where no tokenizer can read it."""
    samples: list[Any] = []
    if text is not None:
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{loaded.source.location} has no tokenizer to read {text} with: quantize with -rtn")
        samples = calibration_inputs(result.program, token_ids(loaded.companions.tokenizer), text)
    made = quantize(result.program, scheme, samples, progress=steps.start("quantize"))
    return replace(result, program=made.program, quantization=made.report)


@dataclass(frozen=True)
class Written:
    """A folder for ONNX Runtime: the exporter's report, that of packing, the names of all files."""

    report: Any
    packed: Any
    files: list[str]


def write_folder(
    onnx: SimpleNamespace,
    loaded: LoadedModel,
    result: Result,
    out: Path,
    steps: Steps,
    *,
    int4: bool = False,
    certify: bool = True,
) -> Written:
    """Export, pack, and put beside it what belongs to the model. Weights are packed before anything appears in ``out``.

    Raises ExportError, ConfigError: as :func:`spinpass.exporters.onnx.export` and what packs.
    """
    pack = _packing(onnx, result.quantization, int4)

    def export(folder: Path) -> Any:
        return onnx.export(
            result.program,
            folder,
            **onnx.cache_names(result.program),
            # a value that lies at a tie may be rounded either way: there is no bound to hold a quantized file to
            verify=None if certify and result.quantization is None else False,
            progress=lambda step: steps.begin(f"onnx: {step}"),
        )

    if pack is None:
        report = export(out)
        return Written(report, None, _write_companions(loaded, report, None, result, out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        report = export(Path(staging))
        steps.start("pack")
        packed = pack(report.path, out)
    report = replace(report, path=packed.path, files=packed.files)
    return Written(report, packed, _write_companions(loaded, report, packed, result, out))


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
    return Written(report, None, _write_companions(loaded, report, None, result, out))


def _packing(onnx: SimpleNamespace, made: QuantizationReport | None, int4: bool) -> Callable[[Path, Path], Any] | None:
    """What makes integers of the exported file, if there are any."""
    if int4:
        return lambda source, target: onnx.quantize_4bit(source, target)
    if made is None or not made.weights:
        return None
    level = 4 if made.activations else 0
    return lambda source, target: onnx.pack_weights(source, target, made.weights, accuracy_level=level)


def _write_companions(loaded: LoadedModel, report: Any, packed: Any, result: Result, out: Path) -> list[str]:
    """Tokenizer, configuration and spinpass.json; returns the names of all files of the export."""
    written = {path.name for path in (packed or report).files}
    if loaded.companions is not None:
        written |= {path.name for path in loaded.companions.save(out)}
    about = manifest(loaded, report, packed, result)
    with staged(out) as staging:
        (staging / "spinpass.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    return sorted(written | {"spinpass.json"})


def manifest(loaded: LoadedModel, report: Any, packed: Any, result: Result) -> dict[str, Any]:
    """What spinpass.json holds."""
    kind = "executorch" if report.path.suffix == ".pte" else "onnx"
    made = {kind: report.to_dict(), "packed": packed and packed.to_dict()}
    return {"model": loaded.source.location} | result.to_dict() | made


def onnx_tools() -> SimpleNamespace:
    """What writes ONNX, imported when it is needed."""
    try:
        from .exporters import onnx, onnx_names, onnx_pack, onnx_quantize
    except ModuleNotFoundError as error:
        raise ExportError(f"writing ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return SimpleNamespace(
        export=onnx.export,
        cache_names=onnx_names.cache_names,
        pack_weights=onnx_pack.pack_weights,
        quantize_4bit=onnx_quantize.quantize_4bit,
    )


def executorch_tools() -> SimpleNamespace:
    """What writes for ExecuTorch, imported when it is needed."""
    try:
        from .exporters import executorch
    except ModuleNotFoundError as error:
        raise ExportError(f"writing for ExecuTorch needs {error.name}: pip install 'spinpass[executorch]'") from error
    return SimpleNamespace(export=executorch.export)


def check_writable(folder: Path) -> None:
    """Before minutes of work: ExportError where nothing can be written. Leaves no new folder behind."""
    created = not folder.exists()
    with staged(folder):
        pass
    if created:
        folder.rmdir()


def version_of(package: str) -> str:
    """Of an installed package, for people to read."""
    try:
        return version(package)
    except PackageNotFoundError:  # not installed, or run from a source tree
        return "not installed"

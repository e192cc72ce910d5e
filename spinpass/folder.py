"""From a loaded model to a folder that ONNX Runtime runs: rotate, certify, quantize, export, pack, what lies beside."""

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
from .artefact import MANIFEST, hashes
from .config import RotationConfig
from .console import Steps
from .errors import ConfigError, ExportError
from .exporters.files import staged
from .exporters.loading import Companions, LoadedModel
from .planning import RotationPlan
from .quantization import QuantizationReport, quantize
from .scoring import token_ids
from .texts import calibration_inputs, calibration_windows
from .transform import plan, transform

_PACKAGES = ("spinpass", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Result:
    """A program and how it came about; without a plan where nothing was asked for."""

    program: ExportedProgram
    plan: RotationPlan | None = None
    quantization: QuantizationReport | None = None

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
class CacheBits:
    """How the KV cache is stored: integers of so many ``bits``, with scales from the UTF-8 file ``text``."""

    bits: int
    text: Path


@dataclass(frozen=True)
class Written:
    """A folder for ONNX Runtime: the exporter's report, those of packing and of the cache, the names of all files."""

    report: Any
    packed: Any
    cache: Any
    files: list[str]


def write_folder(
    onnx: SimpleNamespace,
    loaded: LoadedModel,
    result: Result,
    out: Path,
    steps: Steps,
    *,
    int4: bool = False,
    fuse: bool = True,
    cache: CacheBits | None = None,
    certify: bool = True,
) -> Written:
    """Export, pack, quantize the cache, and put beside it what belongs to the model. What is written on the way does
    not appear in ``out``.

    Raises ExportError, ConfigError: as :func:`spinpass.exporters.onnx.export` and what packs.
    """
    pack = _packing(onnx, result.quantization, int4)

    def export(folder: Path) -> Any:
        return onnx.export(
            result.program,
            folder,
            **onnx.cache_names(result.program),
            fuse=fuse,
            # a value that lies at a tie may be rounded either way: there is no bound to hold a quantized file to
            verify=None if certify and result.quantization is None else False,
            progress=lambda step: steps.begin(f"onnx: {step}"),
        )

    later: dict[str, Callable[[Path, Path], Any]] = {} if pack is None else {"pack": pack}
    if cache is not None:
        later["cache"] = _cache_writer(onnx, loaded, cache)
    if not later:
        report = export(out)
        return Written(report, None, None, _write_companions(onnx, loaded, report, None, None, result, out))
    out.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        report = export(Path(staging, "0"))
        source = report.path
        for step, write in later.items():
            steps.start(step)
            made[step] = write(source, out if step == list(later)[-1] else Path(staging, step))
            source = made[step].path
    report = replace(report, path=source, files=made[step].files)
    packed, stored = made.get("pack"), made.get("cache")
    return Written(report, packed, stored, _write_companions(onnx, loaded, report, packed, stored, result, out))


def _cache_writer(onnx: SimpleNamespace, loaded: LoadedModel, cache: CacheBits) -> Callable[[Path, Path], Any]:
    """What quantizes the cache of an exported file. ConfigError where no tokenizer can read the text."""
    if loaded.companions is None or loaded.companions.tokenizer is None:
        raise ConfigError(f"{loaded.source.location} has no tokenizer to read {cache.text} with")
    texts = calibration_windows(token_ids(loaded.companions.tokenizer), cache.text)
    return lambda source, target: onnx.quantize_cache(source, target, cache.bits, texts)


def _packing(onnx: SimpleNamespace, made: QuantizationReport | None, int4: bool) -> Callable[[Path, Path], Any] | None:
    """What makes integers of the exported file, if there are any."""
    if int4:
        return lambda source, target: onnx.quantize_4bit(source, target)
    if made is None or not made.weights:
        return None
    level = 4 if made.activations else 0
    return lambda source, target: onnx.pack_weights(source, target, made.weights, accuracy_level=level)


def _write_companions(
    onnx: SimpleNamespace, loaded: LoadedModel, report: Any, packed: Any, cache: Any, result: Result, out: Path
) -> list[str]:
    """Tokenizer, configurations and spinpass.json; returns the names of all files of the export."""
    written = {path.name for path in report.files}
    about = manifest(loaded, report, packed, cache, result)
    if loaded.companions is not None:
        written |= {path.name for path in loaded.companions.save(out)}
        about["genai"] = _write_genai_config(onnx, loaded.companions, out)
        written |= {about["genai"]["file"]} - {None}
    about["files"] = hashes(out, written)
    with staged(out) as staging:
        (staging / MANIFEST).write_text(json.dumps(about, indent=2), encoding="utf-8")
    return sorted(written | {MANIFEST})


def _write_genai_config(onnx: SimpleNamespace, companions: Companions, out: Path) -> dict[str, str | None]:
    """Where ONNX Runtime GenAI can run the graph; else the reason why not, and no file of an earlier export."""
    try:
        file = onnx.save_genai_config(out, companions.config, companions.generation_config)
    except ExportError as error:
        (out / onnx.GENAI_CONFIG).unlink(missing_ok=True)
        return {"file": None, "reason": str(error)}
    return {"file": file.name, "reason": None}


def manifest(loaded: LoadedModel, report: Any, packed: Any, cache: Any, result: Result) -> dict[str, Any]:
    """What spinpass.json holds."""
    made = {"onnx": report.to_dict(), "packed": packed and packed.to_dict(), "cache": cache and cache.to_dict()}
    return {"model": loaded.source.location} | result.to_dict() | made


def onnx_tools() -> SimpleNamespace:
    """What writes ONNX, imported when it is needed."""
    try:
        from .exporters import genai, onnx, onnx_cache, onnx_names, onnx_pack, onnx_quantize
    except ModuleNotFoundError as error:
        raise ExportError(f"writing ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return SimpleNamespace(
        export=onnx.export,
        cache_names=onnx_names.cache_names,
        pack_weights=onnx_pack.pack_weights,
        quantize_4bit=onnx_quantize.quantize_4bit,
        quantize_cache=onnx_cache.quantize_cache,
        save_genai_config=genai.save_genai_config,
        GENAI_CONFIG=genai.CONFIG,
    )


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

"""A folder that ONNX Runtime runs: export, pack the weights, quantize the cache, and what GenAI reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.evaluation import calibration_windows, token_ids
from spinpass.exporters import cache_names, named_record
from spinpass.formats import PREFIX, READS_PADDING, Draft
from spinpass.graph import storage_key, with_other_values
from spinpass.loading import Companions, LoadedModel
from spinpass.progress import Steps
from spinpass.quantization import QuantizedWeight, unrounded_operands
from spinpass.workers import Team

from .card import Card, score_share, scored_card
from .companions import Written, write_companions
from .judge import KERNEL_BOUND, TIE_BOUND, FolderTrial
from .result import Result, window_length
from .room import no_room
from .trial import try_folder, try_unrounded, unjudged

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from spinpass.exporters.onnx import CacheReport, KernelRounding, OnnxReport, QuantizeReport, StoredConstants

    _Made = QuantizeReport | CacheReport
    _Step = Callable[[Path, Path], _Made]  # (source, destination)

_AT_A_TIE = "it rounds activations, and the last bit decides which way; what it generates was compared instead"
_REPORTS = {"packed": "pack", "cache": "cache"}  # in spinpass.json: of which step


class OnnxTools(Protocol):
    """This is what a folder needs of :mod:`spinpass.exporters.onnx`, which :func:`onnx_tools` imports."""

    def check_operators(self, ep: ExportedProgram, /) -> None: ...

    def check_kernels(self, ep: ExportedProgram, /) -> None: ...

    def check_dtypes(self, found: Set[str], /) -> None: ...

    def export(
        self,
        ep: ExportedProgram,
        path: Path,
        /,
        *,
        input_names: Mapping[str, str],
        output_names: Mapping[str, str],
        fuse: bool,
        external_data: bool | None,
        verify: bool | None,
        metadata: Mapping[str, str] | None,
        weights: Mapping[str, QuantizedWeight] | None,
        accuracy_level: int,
        team: Team,
        progress: Callable[[str], None],
    ) -> OnnxReport: ...

    def assist(
        self,
        ep: ExportedProgram,
        team: Team,
        /,
        *,
        input_names: Mapping[str, str],
        output_names: Mapping[str, str],
        fuse: bool,
        weights: Mapping[str, QuantizedWeight] | None,
        accuracy_level: int,
    ) -> None: ...

    def quantize_4bit(self, source: Path, destination: Path, /) -> QuantizeReport: ...

    def quantize_cache(
        self, source: Path, destination: Path, bits: int, calibration: Sequence[Sequence[int]], /
    ) -> CacheReport: ...

    def check_packed(self, path: Path, weights: Mapping[str, QuantizedWeight], /) -> int: ...

    def dequantized_constants(self, path: Path, constants: Mapping[str, Tensor], /) -> StoredConstants: ...

    def kernel_rounding(self, path: Path, /) -> KernelRounding: ...

    def unrounded_copy(self, source: Path, destination: Path, /) -> Path: ...

    def check_cache(self, path: Path, unrounded: Path, calibration: Sequence[Sequence[int]], /) -> None: ...

    def save_genai_config(self, folder: Path, config: Any, generation_config: Any, /) -> Path: ...


@dataclass(frozen=True)
class CacheBits:
    """It says how the KV cache is stored: as integers of so many ``bits``, with scales from so many ``windows`` of the
    UTF-8 file ``text``; None takes what it holds."""

    bits: int
    text: Path
    windows: int | None = None


def write_folder(
    onnx: OnnxTools,
    loaded: LoadedModel,
    result: Result,
    draft: Draft,
    steps: Steps,
    *,
    int4: bool = False,
    fuse: bool = True,
    cache: CacheBits | None = None,
    certify: bool = True,
    memory: int | None = None,
    team: Team | None = None,
) -> Written:
    """Export, pack, quantize the cache, put beside it what belongs to the model, and try the folder.

    What is written on the way does not stay in the draft.

    Args:
        onnx: what :func:`onnx_tools` returns.
        loaded: the model, with what lies beside it.
        result: its program, rotated and quantized as it is to be written.
        draft: of the folder, see :func:`spinpass.formats.drafted`.
        steps: they are told as they begin.
        int4: round the weights to four bits.
        fuse: use ONNX Runtime's own operators.
        cache: how the KV cache is stored; None leaves it in floats.
        certify: compare the file and the folder with the program.
        memory: bytes that may be taken, by runtimes too: what they have no room for is certified, but not run.
        team: of whose ranks this is the first; the others call :func:`assist_folder`.

    Raises:
        ConfigError, ExportError, VerificationError: :func:`spinpass.exporters.onnx.export` raises them, what packs, or
            :func:`.trial.try_folder`.
    """

    def export(folder: Path, external_data: bool | None = None) -> OnnxReport:
        made = onnx.export(
            result.program,
            folder,
            **_asked(result, int4=int4, fuse=fuse),
            external_data=external_data,
            verify=None if certify and not result.rounds_activations else False,
            metadata={READS_PADDING: "true"} if loaded.reads_padding else None,
            team=team or Team(),
            progress=lambda step: steps.begin(f"onnx: {step}"),
        )
        return replace(made, uncertified=_AT_A_TIE) if certify and result.rounds_activations else made

    texts = [] if cache is None else _calibration(loaded, cache)
    rounded = _is_rounded(result, int4=int4, cache=cache)

    @functools.cache
    def not_run() -> str:  # asked once: what is free changes
        packed = int4 or bool(result.quantization is not None and result.quantization.weights)
        return no_room(draft.folder, memory, integers=packed)

    def tried() -> list[FolderTrial]:
        expected = _expected(onnx, result, draft.folder, int4=int4, certify=certify)
        if not_run():
            return [FolderTrial("all", "all", reason=not_run())]
        return _tried(onnx, loaded, result, expected, draft.folder, steps, texts)

    def scored() -> Card | str | None:
        return scored_card(loaded, draft.folder, steps, team=team, why=not_run()) if rounded else None

    later: dict[str, _Step] = {"pack": onnx.quantize_4bit} if int4 else {}
    if cache is not None:
        bits = cache.bits
        later["cache"] = lambda source, target: onnx.quantize_cache(source, target, bits, texts)
    if not later:
        report = export(draft.folder)
        if result.rounds_activations and not_run():
            report = replace(report, uncertified=_unproved(not_run()))
        return _written(onnx, loaded, result, draft, report, _packed(report), tried, scored)
    made: dict[str, _Made] = {}
    with TemporaryDirectory(dir=draft.folder.parent, prefix=PREFIX) as staging:  # in the draft's it would be cleared up
        report = export(Path(staging, "0"), external_data=True)  # read again a tensor at a time
        if cache is not None and report.fused is not None and report.fused.kept:
            why = report.fused.kept[0]
            raise ExportError(f"only ONNX Runtime's own attention reads a cache of integers, and this is not it: {why}")
        source = report.path
        for step, write in later.items():
            steps.start(step)
            made[step] = write(source, draft.folder if step == list(later)[-1] else Path(staging, step))
            source = made[step].path
    made = _packed(report) | made
    report = replace(report, path=source, files=made[step].files)
    if (cache is not None or result.rounds_activations) and not_run():  # the certificate is of the file before this
        report = replace(report, certificate=None, uncertified=_unproved(not_run()))
    return _written(onnx, loaded, result, draft, report, made, tried, scored)


def _unproved(why: str) -> str:
    return f"a file that rounds as it runs is judged by what it generates, and it was not run: {why}"


def assist_folder(
    onnx: OnnxTools,
    team: Team,
    loaded: LoadedModel,
    result: Result,
    draft: Draft,
    steps: Steps,
    *,
    int4: bool = False,
    fuse: bool = True,
    cache: CacheBits | None = None,
    certify: bool = True,
) -> Written:
    """Do this rank's share of a folder that rank 0 writes by :func:`write_folder`: a part of the data, and of the text
    that the file is scored on. What is returned says nothing of the folder."""
    del steps, certify  # they are rank 0's
    onnx.assist(result.program, team, **_asked(result, int4=int4, fuse=fuse))
    if _is_rounded(result, int4=int4, cache=cache):
        score_share(loaded, draft.folder, team)
    return Written(None, {}, [], loading=loaded.report)


def _is_rounded(result: Result, *, int4: bool, cache: CacheBits | None) -> bool:
    """Say whether the file computes something else than the model that it was made of, and is scored."""
    quantized = None if int4 else result.quantization
    packed = int4 or bool(quantized is not None and quantized.weights)
    return packed or cache is not None or result.rounds_activations


def _asked(result: Result, *, int4: bool, fuse: bool) -> dict[str, Any]:
    """Return what makes the model of a file; every rank makes the same."""
    quantized = None if int4 else result.quantization
    return {
        **cache_names(result.program),
        "fuse": fuse,
        "weights": None if quantized is None else quantized.weights,
        "accuracy_level": 4 if quantized is not None and quantized.activations else 0,
    }


def _packed(report: OnnxReport) -> dict[str, _Made]:
    return {} if report.packed is None else {"pack": report.packed}


def _written(
    onnx: OnnxTools,
    loaded: LoadedModel,
    result: Result,
    draft: Draft,
    report: OnnxReport,
    made: Mapping[str, _Made],
    tried: Callable[[], Sequence[FolderTrial]],
    scored: Callable[[], Card | str | None],
) -> Written:
    report = draft.in_place(report)
    record = named_record(result.program, report.inputs, report.outputs)
    files = {path.name for path in report.files}
    report = replace(report, bytes=sum((draft.folder / name).stat().st_size for name in files))  # after packing
    reports: dict[str, Any] = {"onnx": _by_name(report.to_dict()), "record": record}
    reports |= {name: _by_name(made[step].to_dict()) if step in made else None for name, step in _REPORTS.items()}
    if loaded.companions is not None:
        reports["genai"] = _write_genai_config(onnx, loaded.companions, draft.folder)
        files |= {reports["genai"]["file"]} - {None}
    about = write_companions(loaded, result, reports, files, draft, tried, scored)
    return Written(report, *about, loading=loaded.report)


def _by_name(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the names of its files: a folder may be moved."""
    return report | {"path": Path(report["path"]).name, "files": [Path(file).name for file in report["files"]]}


@dataclass(frozen=True)
class _Expected:
    """The program that a folder should compute; why it cannot be judged by it, if so; and why it can only roughly."""

    program: ExportedProgram
    why: str = ""
    roughly: str = ""


def _expected(onnx: OnnxTools, result: Result, folder: Path, *, int4: bool, certify: bool) -> _Expected:
    """Return what the folder should compute, integers in the file compared with it.

    Raises VerificationError where a packed weight stands for other values than it should.
    """
    program = result.program if result.scored is None else result.scored
    why = unjudged(program, certify=certify)
    if result.quantization is not None and result.quantization.weights:
        onnx.check_packed(folder, result.quantization.weights)
    if not int4:
        return _Expected(program, why)
    stored = onnx.dequantized_constants(folder, program.state_dict)
    if not stored.whole:
        return _Expected(program, why or "a packed matrix is computed from several parameters")
    at = {storage_key(program.state_dict[name]): tensor for name, tensor in stored.values.items()}  # tied ones share it
    state = {name: at.get(storage_key(tensor)) for name, tensor in program.state_dict.items()}
    rounded = with_other_values(program, {name: tensor for name, tensor in state.items() if tensor is not None})
    return _Expected(rounded, why, f"{stored.mixed[0]} is rounded for one of its uses alone" if stored.mixed else "")


def _tried(
    onnx: OnnxTools,
    loaded: LoadedModel,
    result: Result,
    expected: _Expected,
    folder: Path,
    steps: Steps,
    texts: Sequence[Sequence[int]],
) -> list[FolderTrial]:
    """Try the folder; where its operators round as they run, first the same file without that, which has to be equal.

    Raises VerificationError: one of the two is not what the program computes.
    """
    program, why = expected.program, expected.why
    rounding = onnx.kernel_rounding(folder)
    ties = TIE_BOUND if result.rounds_activations else None
    exact: list[FolderTrial] = []
    if rounding and not why:
        copy = onnx.unrounded_copy(folder, folder / f"{PREFIX}unrounded.onnx")
        try:
            if texts:
                onnx.check_cache(folder, copy, texts)
            unrounded, roughly = _unrounded(result, program, expected.roughly, products=rounding.products)
            if unrounded is None:
                exact = [FolderTrial("onnxruntime, unrounded", "all", reason=roughly)]
            else:
                exact = try_unrounded(loaded, unrounded, copy, steps, bound=ties)
        finally:
            copy.unlink(missing_ok=True)
    try:
        return [*try_folder(loaded, program, folder, steps, bound=KERNEL_BOUND if rounding else ties, why=why), *exact]
    except VerificationError as error:
        if not texts or not exact or expected.roughly:
            raise
        raise VerificationError(
            f"{error}. With a cache of floats it does: the calibration text does not show the values that other texts "
            "have. Calibrate with text of the kind that the model is for, or leave out --kv-cache"
        ) from error


def _unrounded(
    result: Result, program: ExportedProgram, roughly: str, *, products: int
) -> tuple[ExportedProgram | None, str]:
    """Return what a file computes whose operators do not round, or None and why that is not known."""
    made = result.quantization
    if roughly or made is None or not products or not result.rounds_activations:
        return (None, roughly) if roughly else (program, "")
    # products of a program that rounds them itself have another rounding in their place, not one on top
    return unrounded_operands(program, made.weights), "a product of it has no single operand that is rounded"


def _calibration(loaded: LoadedModel, cache: CacheBits) -> list[list[int]]:
    """Return the texts that a cache is calibrated with. Raises ConfigError where no tokenizer can read them."""
    if loaded.companions is None or loaded.companions.tokenizer is None:
        raise ConfigError(f"{loaded.source.location} has no tokenizer to read {cache.text} with")
    length = window_length(loaded.companions)
    return calibration_windows(token_ids(loaded.companions.tokenizer), cache.text, length, cache.windows)


def _write_genai_config(onnx: OnnxTools, companions: Companions, folder: Path) -> dict[str, str | None]:
    """Write the file where ONNX Runtime GenAI can run the graph; else say why not."""
    try:
        file = onnx.save_genai_config(folder, companions.config, companions.generation_config)
    except ExportError as error:
        return {"file": None, "reason": str(error)}
    return {"file": file.name, "reason": None}


def onnx_tools() -> OnnxTools:
    """Import what writes ONNX, when it is needed. Raises ExportError where a package is missing."""
    try:
        from spinpass.exporters import onnx
    except ModuleNotFoundError as error:
        raise ExportError(f"writing ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return onnx

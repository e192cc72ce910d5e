"""How an export is carried out: load, rotate, certify, quantize, write, try, score.

model  ->  program  ->  rotated  ->  rounded  ->  a folder that was run and scored
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError, SpinpassError
from spinpass.evaluation import (
    CALIBRATION_LENGTH,
    SELF,
    learning_text,
    named_dataset,
    own_tokens,
    read_dataset,
    token_ids,
)
from spinpass.formats import Draft, KeptWork, drafted
from spinpass.graph import HOST, Device, on_device
from spinpass.learned import NothingToBalance, balance, with_learned_bases
from spinpass.learning import Learning, LearningRecord
from spinpass.loading import LoadedModel, check_program_options, load_model
from spinpass.passes import last_token
from spinpass.planning import RotationPlan
from spinpass.progress import Silent, Steps
from spinpass.quantization import check_shares
from spinpass.workers import Team

from .companions import Written, check_target
from .compared import Made, the_better
from .endings import cheaper, kept_for_another_try, out_of_memory, still_the_same, whose_memory
from .forecast import Forecast
from .gptq import check_rotation
from .onnx import CacheBits, onnx_tools
from .preflight import Known
from .recipes import LearnName, RecipeName
from .request import ExportRequest, IntegerCache, Target
from .result import Result, check_names, kept_on_disk, quantized, rotated, run_of, told_plan, window_length
from .settings import settings_of
from .writers import writer_of

CONTEXT = 1024
"""Tokens of the cache inside an ExecuTorch program where none are asked for."""

_EXPERTS = {"onnx": "grouped_mm", "executorch": "batched_mm"}
"""The implementation of a mixture's experts, as transformers calls it, whose operators the target has.

``batched_mm`` gathers the weights of every token's experts: 151 MB for each token in each layer of a model of width
2048 with eight experts of width 768 at a time. The grouped product reads a weight once, however many tokens go to it.
"""
_ROWS = 16  # texts that a model writes at once
_DEFAULT = RotationConfig()


def export(
    model: str | Path,
    out: str | Path,
    config: RotationConfig | None = _DEFAULT,
    *,
    to: Target = "onnx",
    bits: int | None = None,
    recipe: RecipeName = "auto",
    quantize: str = "",
    keep: Sequence[str] = (),
    layers: Sequence[tuple[str, str]] = (),
    compare: bool = False,
    learn: LearnName | None = None,
    minutes: float | None = None,
    learning_seed: int = 0,
    calibration: str | Path | None = None,
    calibration_windows: int | None = None,
    int4: bool = False,
    kv_cache: IntegerCache | None = None,
    dtype: str = "float32",
    device: Device = HOST,
    cache: bool = True,
    context: int | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    last_logits: bool | None = None,
    fuse: bool = True,
    certify: bool = True,
    allow_partial: bool = False,
    force: bool = False,
    memory: str | int | None = None,
    plan: RotationPlan | None = None,
    steps: Steps | None = None,
    team: Team | None = None,
) -> Written:
    """Load a model, rotate it, certify it, and write a folder that a runtime runs: ``spinpass export`` from Python.

    Args:
        model: a model folder, a name on the hub, a GGUF file or a .pt2 file.
        out: the folder that is written: the model, its tokenizer and configuration, ``spinpass.json``.
        config: what is rotated; None writes the original, to compare with.
        to: the runtime that the folder is for, or ``"gptq"`` for a checkpoint.
        bits: of the weights: 16 keeps the values, 8, 4, 3 and 2 take what :mod:`.recipes` says for the runtime. None is
            4, unless ``quantize`` or ``int4`` says how to round.
        recipe: ``auto``, the best that was measured for these bits, ``quick``, the same on less text, or ``plain``,
            rounding to nearest without rotation. A ``config`` of yours is rotated by in its place.
        quantize: a scheme in place of a recipe, for example ``"w4g128-gptq-a8"``.
        keep: patterns of parameter names whose layers are left in floats; one that matches nothing is an error.
        layers: pairs of a pattern of parameter names and a scheme of weights for their layers; the first match counts.
        learn: what the rounded model learns from the original: ``none``; ``local``, block by block; ``full``, by what
            it predicts. None leaves it to the recipe or scheme, and is ``full`` with ``minutes``.
        minutes: the wall-clock time that learning may take, in minutes; None for three rounds through the text.
        learning_seed: of the order in which learning goes through the text.
        compare: make the original by the same scheme as well, and keep which does better on text.
        calibration: the file of a UTF-8 text for GPTQ, static ranges and ``kv_cache``; or a dataset, as
            :func:`spinpass.evaluation.read_dataset` takes it; or ``"self"``, text that the model writes. By default,
            where one is needed, the text of this package.
        calibration_windows: how many windows of 512 tokens of the text are read; by default what it holds, at most 16.
        int4: pack the weights to 4 bits (MatMulNBits), without a scheme.
        kv_cache: keep keys and values as integers of this width (ONNX Runtime).
        dtype: that of the weights, float32, float16 or bfloat16; ``"auto"`` takes the dtype they are stored in.
        device: where weights are folded and rounded, and programs are run: ``cpu``, ``cuda`` or ``cuda:N``. Codes and
            files are made on the host, and results are the same but for the order in which sums are added up.
        cache: export with a KV cache; without one the program takes whole prompts alone.
        context: how many tokens the KV cache inside an ExecuTorch program holds, 1024 by default.
        dequantize: where the model is quantized (GPTQ, compressed-tensors, FP8, MXFP4), take the values of its codes.
        trust_remote_code: run the modelling code that comes with the model.
        last_logits: compute the logits of a prompt's last token alone, which is all that generation reads. None does so
            where an ONNX folder has a cache and follows a recipe of less than 16 bits, if its head allows it.
        fuse: use ONNX Runtime's own operators for attention.
        certify: prove the rotated program, and the file, equivalent before anything stays on the disk.
        allow_partial: where that proof fails, leave out the rotations to blame instead of raising.
        force: write into a folder that holds files of others, too.
        memory: how much the run may take beyond what is taken by others, ``"12GB"`` or a number of bytes; None for what
            is free. What cannot fit is refused before anything is read.
        plan: decisions made earlier, in place of a ``config`` (:func:`spinpass.plan`, :func:`spinpass.load_plan`).
        steps: told what begins, and before it what will.

    Returns:
        The exporter's report, what ``spinpass.json`` holds (plan, certificates, hashes), and the names of all files.
        Ranks other than the first have no report.

    Raises:
        ConfigError: a combination that means nothing, a device that is not there, a model or text that cannot be read.
        ExportError: the runtime's packages are missing, the folder cannot be written, memory or disk are too small, or
            somebody has written to the model's files meanwhile.
        RefusedError: nothing can be rotated.
        VerificationError: the rotated program, or the file, is not equivalent.
        WorkerError: a rank of the team was lost.
    """
    request = ExportRequest(
        str(model), Path(out), config, to, quantize=quantize, calibration=calibration, int4=int4, kv_cache=kv_cache,
        dtype=dtype, cache=cache, context=context, dequantize=dequantize, bits=bits, recipe=recipe,
        keep=tuple(keep), layers=tuple(layers), compare=compare, learn=learn, minutes=minutes,
        learning_seed=learning_seed, device=device,
        trust_remote_code=trust_remote_code, last_logits=last_logits, fuse=fuse, certify=certify,
        calibration_windows=calibration_windows, force=force, allow_partial=allow_partial, memory=memory,
        plan=plan,
    )  # fmt: skip
    steps = steps or Silent()
    try:
        return carry_out(request, steps, team)[1]
    finally:
        steps.finish()


def carry_out(request: ExportRequest, steps: Steps, team: Team | None = None) -> tuple[Result, Written]:
    """Load, rotate, certify, quantize, write. What is missing is said before the minutes of work.

    Raises ConfigError, ExportError, RefusedError, VerificationError and WorkerError, as :func:`export`.
    """
    team = team or Team()
    with team.as_one():
        if team.leads:
            check_target(request.out, request.model, force=request.force)
        made = _carried_out(request, steps, team)
        team.gathered(None)  # no rank ends before the folder is there
        return made


def _carried_out(request: ExportRequest, steps: Steps, team: Team) -> tuple[Result, Written]:
    write = writer_of(request, team)
    try:
        with drafted(request.out, team) as draft:
            dataset, windows, forecast = preflight(request, kept=KeptWork(draft.work).bytes)
            check_shares(team.size if windows is None else windows, team)
            if forecast is not None:
                steps.expect([(step.name, step.seconds) for step in forecast.steps])
            return _Run(request, write, dataset, windows, draft, steps, team).made()
    except (MemoryError, OSError, RuntimeError, SpinpassError) as error:
        if not out_of_memory(error):
            raise
        raise ExportError(f"{whose_memory(request)} is not enough: {cheaper(request)}") from error


@dataclass(frozen=True)
class _Run:
    """One export under way.

    Attributes:
        dataset: the text of the dataset that is calibrated on, empty where none is.
        windows: how many windows calibrate, None where nothing does.
    """

    request: ExportRequest
    write: Callable[..., Written]
    dataset: str
    windows: int | None
    draft: Draft
    steps: Steps
    team: Team

    def made(self) -> tuple[Result, Written]:
        """Make the folder; with ``compare``, that of the original as well, and keep the better."""
        loaded = self._loaded(cache=self.request.cache and self.request.to != "gptq")
        text = self._text(loaded)
        work = self._work(loaded, text)
        with kept_for_another_try(self.draft, self.team), still_the_same(loaded.files, self.steps):
            result, written = self._better(loaded, text, work)
            manifest, files = self.team.told([written.manifest, written.files])
            return result, replace(written, manifest=manifest, files=files)

    def _better(self, loaded: LoadedModel, text: Path | None, work: KeptWork | None) -> tuple[Result, Written]:
        made = self._of(loaded, self.request.config, text, work, self.draft)
        if self.request.compare:
            beside = Draft(self.draft.out, self.draft.folder.parent / "original")
            if self.team.leads:
                beside.folder.mkdir()
            other = self._of(loaded, None, text, work, beside)
            if self.team.leads:
                made = the_better(loaded, made, other, self.draft, beside)
        return made.result, made.written

    def _of(
        self,
        loaded: LoadedModel,
        config: RotationConfig | None,
        text: Path | None,
        work: KeptWork | None,
        draft: Draft,
    ) -> Made:
        asked, steps = self.request, self.steps
        there = on_device(loaded.program, asked.device)
        options: dict[str, Any] = {"certify": asked.certify, "allow_partial": asked.allow_partial}
        learning = asked.bases if config is not None else None
        chosen, record = (config, None) if learning is None else self._based(loaded, there, learning, text)
        planned = asked.plan if config is not None else None
        result = replace(rotated(there, chosen, steps, team=self.team, plan=planned, **options), bases=record)
        result = replace(result, program=self._kept(result.program))
        if asked.to == "gptq":
            check_rotation(loaded, result)
        if asked.scheme is not None:
            kept = None if work is None else work.of_kind("original" if config is None else "rotated")
            file = None if kept is None else kept.learning
            result = quantized(result, loaded, asked.scheme, text, steps, self.windows, kept, self.team, file)
            result = replace(result, program=self._kept(result.program))
        result = replace(result, program=on_device(result.program, HOST))
        options = {"certify": asked.certify}
        options |= {} if asked.kv_cache is None or text is None else {"cache": self._cache_bits(text)}
        result = self._headed(result)
        result = replace(
            result, settings=settings_of(asked, config, windows=self.windows, last_logits=result.scored is not None)
        )
        return Made(result, self.write(loaded, result, draft, steps, **options))

    def _based(
        self, loaded: LoadedModel, program: ExportedProgram, learning: Learning, text: Path | None
    ) -> tuple[RotationConfig | None, LearningRecord]:
        """Return what is rotated, with changes of basis for the scheme: balanced, and where none can be, learned."""
        asked, scheme = self.request, self.request.scheme
        assert asked.config is not None and scheme is not None and text is not None
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{loaded.source.location} has no tokenizer to read {text} with: leave --learn out")
        tokenize, longest = token_ids(loaded.companions.tokenizer), window_length(loaded.companions)
        read = learning_text(program, tokenize, text, learning, 1, longest)
        with contextlib.suppress(NothingToBalance):
            return balance(program, asked.config, scheme, read.shown, read.held_out, self.steps)
        self.draft.work.mkdir(exist_ok=True)
        options: dict[str, Any] = {"team": self.team, "checkpoint": self.draft.work / "bases.pt"}
        options |= {"held_out": read.held_out, "steps": self.steps}
        return with_learned_bases(program, asked.config, scheme, read.shown, learning, **options)

    def _kept(self, program: ExportedProgram) -> ExportedProgram:
        """Return the program with what is read again and again kept on the disk, if there is room for it."""
        return kept_on_disk(program, self.draft.folder.parent, self.team.size)

    def _headed(self, result: Result) -> Result:
        """Return the result with the logits that are asked for. Raises ConfigError where those of the last token alone
        are, and the head does not allow it."""
        asked = self.request
        by_default = asked.to == "onnx" and asked.cache and asked.bits not in (None, 16)
        if not (by_default if asked.last_logits is None else asked.last_logits):
            return result
        try:
            return replace(result, program=last_token(result.program), scored=result.program)
        except ConfigError:
            if asked.last_logits:
                raise
            return result

    def _loaded(self, *, cache: bool) -> LoadedModel:
        asked = self.request
        loaded = load_model(
            asked.model,
            dtype=asked.dtype,
            cache=cache,
            context=_context(asked),
            dequantize=asked.dequantize,
            trust_remote_code=asked.trust_remote_code,
            experts=_EXPERTS.get(asked.to),
            streamed=asked.to == "onnx",
            progress=self.steps.begin,
        )
        check_names(asked.scheme, loaded.program)
        if asked.to == "onnx":
            onnx_tools().check_operators(loaded.program)
            if asked.certify:
                onnx_tools().check_kernels(loaded.program)
        return loaded

    def _work(self, loaded: LoadedModel, text: Path | None) -> KeptWork | None:
        """Return what this run has rounded, or one before it that was stopped; None where nothing is to be.

        Raises ConfigError where that was another run, or the ranks are not of one.
        """
        asked = self.request
        run = run_of(
            loaded,
            asked.config,
            # which learning begins with, whether there is to be any
            None if asked.scheme is None else replace(asked.scheme, learn=None),
            text,
            self.windows,
            device=str(asked.device).partition(":")[0],
            target=f"{asked.to}, {asked.dtype}, {asked.cache}, {asked.context}, {asked.dequantize}",
            rotation=f"{asked.certify}, {asked.allow_partial}, {asked.bases}{told_plan(asked.plan)}",
        )
        self._check_one_run(run)
        wanted = self.team.told(asked.scheme is not None or self.draft.work.exists())
        if not wanted:
            return None
        kept = KeptWork.of(self.draft.work, run) if self.team.leads else KeptWork(self.draft.work)
        self.team.gathered(None)
        if kept.count:
            self.steps.begin(f"go on from {kept.count} weights that are rounded")
        return kept

    def _check_one_run(self, run: Mapping[str, str]) -> None:
        first, *others = self.team.gathered(dict(run))
        for rank, other in enumerate(others, 1):
            differing = sorted(name for name in first if first[name] != other.get(name))
            if differing:
                raise ConfigError(
                    f"rank {rank} of {self.team.size} has another {differing[0]} than rank 0: start all of them with "
                    "one command, one model and the same versions"
                )

    def _cache_bits(self, text: Path) -> CacheBits:
        return CacheBits(int(str(self.request.kv_cache).removeprefix("int")), text, self.windows)

    def _text(self, loaded: LoadedModel) -> Path | None:
        """Return the file that is calibrated on. What is in none is written to one that goes with the draft."""
        given = self.request.calibration
        if given is None or not (self.dataset or given == SELF):
            return None if given is None else Path(given)
        path = self.draft.folder.parent / "calibration.txt"
        if self.team.leads:
            path.write_text(self.dataset or self._own_text(loaded), encoding="utf-8")
        self.team.gathered(None)
        return path

    def _own_text(self, loaded: LoadedModel) -> str:
        """Let the model write what its calibration windows are cut from."""
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{loaded.source.location} has no tokenizer to write text with: name a text in a file")
        program = loaded.program
        if self.request.to == "gptq" or not self.request.cache:
            program = self._loaded(cache=True).program
        tokenizer, found = loaded.companions.tokenizer, ""
        length = min(_window(self.request), window_length(loaded.companions))
        needed = (self.windows or 0) * CALIBRATION_LENGTH
        seed = 0
        while len(token_ids(tokenizer)(found)) < needed:  # a text has other tokens than it was written in
            progress = self.steps.start(f"write text {seed + 1}")
            rows = own_tokens(on_device(program, self.request.device), _ROWS, length, seed=seed, progress=progress)
            found += "\n\n".join(tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)) + "\n\n"
            seed += 1
        return found


def preflight(request: ExportRequest, kept: int = 0) -> tuple[str, int | None, Forecast | None]:
    """Say what can be said before the weights are read: model, text, tokenizer, tokens, kernels, disk, memory.

    Returns the text of the dataset that is calibrated on, empty where none is, how many windows calibrate, and what the
    run will take, None where nothing says how large the model is. ``kept``: bytes of rounded weights that a run which
    was stopped has left. Raises ConfigError and ExportError, as :func:`export`.
    """
    known = Known.of(request.model, dequantize=request.dequantize, trust_remote_code=request.trust_remote_code)
    check_program_options(
        known.source,
        dtype=request.dtype in ("float16", "bfloat16"),
        no_cache=not request.cache,
        context=request.context is not None,
        dequantize=request.dequantize,
        trust_remote_code=request.trust_remote_code,
    )
    dataset = named_dataset(request.calibration)
    read = read_dataset(dataset) if dataset else ""
    windows = None
    if request.calibration is not None:
        count, most = request.calibration_windows, request.most_windows
        windows = known.windows_of(request.calibration, read, _window(request), count, most)
    context = _context(request)
    if context is not None:
        known.check_context(context)
    if request.kv_cache is not None:
        known.check_integer_cache(request.kv_cache, request.dtype)
    if request.to == "onnx" and request.stored_bits is not None:
        known.check_integer_kernels(request.dtype)
    if request.to == "openvino":
        known.check_openvino(request.dtype, integers=request.stored_bits is not None)
    if request.to == "onnx" and request.certify and request.dtype in ("float16", "bfloat16"):
        onnx_tools().check_dtypes({request.dtype})
    copies = request.int4 or (request.to == "onnx" and request.kv_cache is not None)
    codes = request.to == "onnx" and request.scheme is not None
    known.check_disk(request.out, request.dtype, request.stored_bits, floats=copies, codes=codes, kept=kept)
    work = known.workload(request, windows)
    known.check_memory(request, work)
    return read, windows, None if work is None else Forecast.of(work)


def _context(request: ExportRequest) -> int | None:
    return (request.context or CONTEXT) if request.to == "executorch" else None


def _window(request: ExportRequest) -> int:
    """Tokens of a calibration window."""
    return min(CALIBRATION_LENGTH, _context(request) or CALIBRATION_LENGTH)

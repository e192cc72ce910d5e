"""Checkpoint to checkpoint: a folder of transformers with R1 and R2 folded into its weights, for any loader of such.

    IN: shards, configuration, tokenizer  ->  OUT: the same names, another basis, in a layout of :mod:`.layouts`

The weights are read from the files of IN, folded, rounded and written one after the other
(:class:`spinpass.graph.Handle`); codes wait in files of the workplace. The written folder is loaded again, and its
logits are compared with the program's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, VerificationError
from spinpass.formats import Draft, KeptWork, drafted
from spinpass.graph import HOST, Device, named_device, on_device
from spinpass.loading import LoadedModel, load_model
from spinpass.passes import online_transforms
from spinpass.progress import Silent, Steps

from .companions import Written, check_target, write_companions
from .endings import kept_for_another_try, still_the_same
from .gptq import certify_as_exported, check_not_online, check_rotation, check_same_architecture, described
from .judge import FolderTrial
from .layout_trial import tried_layout
from .layouts import CheckpointLayout, CheckpointRequest, write_layout
from .result import Result, check_names, kept_on_disk, quantized, rotated, run_of

FOLDED = RotationConfig(rotations=("R1", "R2"), form="offline", tied="untie")
"""What a checkpoint can hold: rotations that are folded into weights."""


_EXPERTS = "batched_mm"  # transformers' grouped product has no float64, which proofs compute in


def rotate_checkpoint(
    model: str | Path,
    out: str | Path,
    config: RotationConfig = FOLDED,
    *,
    quantize: str = "",
    layout: CheckpointLayout | None = None,
    calibration: str | Path | None = None,
    calibration_windows: int | None = None,
    keep: Sequence[str] = (),
    dtype: str = "auto",
    dequantize: bool = False,
    device: Device = HOST,
    certify: bool = True,
    force: bool = False,
    steps: Steps | None = None,
) -> tuple[Result, Written]:
    """Fold rotations into a checkpoint of transformers and write it as one: ``spinpass rotate-checkpoint`` from Python.

    Args:
        model: a model folder, a name on the hub or a GGUF file.
        out: the folder that is written: weights in safetensors files, configuration, tokenizer, ``spinpass.json``.
        config: rotations that are folded, R1 and R2 or one of them. A tied head gets a table of its own, unless the
            config keeps it tied, which R1 is not folded with. In the layout ``compressed-tensors`` R3, R4 and others
            may stand online.
        quantize: a scheme of weights, for example ``"w4g128-gptq"``; empty keeps the values.
        layout: ``transformers`` for floats, the default, ``gptq`` for integers, the default with ``quantize``, or
            ``compressed-tensors`` for either, online rotations declared.
        calibration: a file of UTF-8 text for GPTQ; where one is needed, the text of this package by default.
        calibration_windows: how many windows of it are read; by default what it holds, at most 16.
        keep: patterns of parameter names whose layers are left in floats.
        dtype: that of the weights; ``"auto"`` keeps the one they are stored in.
        dequantize: where the model is quantized, take the values of its codes, which memory then holds; it is refused
            otherwise.
        device: where weights are folded and programs are run: ``cpu``, ``cuda`` or ``cuda:N``.
        certify: prove the program, the architecture with these weights, and the written folder equivalent.
        force: write into a folder that holds files of others, too.
        steps: told what begins.

    Returns:
        What was made, and the report, what ``spinpass.json`` holds, and the names of all files.

    Raises:
        ConfigError: there is no such device; a rotation that is online, where the layout declares none, or has no name
            in it; one that the architecture has no parameters for; weights that the layout cannot hold; no folder of a
            model, or one that is rotated already.
        RefusedError: nothing can be rotated.
        VerificationError: the architecture with these weights is another function, or a loader reads other values.
        ExportError: transformers or safetensors is missing, or the folder is not writable.
    """
    asked = CheckpointRequest(config, quantize, layout, calibration, calibration_windows, tuple(keep))
    out, steps, there = Path(out), steps or Silent(), named_device(device)
    check_target(out, str(model), force=force)
    with drafted(out) as draft:
        loaded = load_model(
            model,
            dtype=dtype,
            cache=False,
            dequantize=dequantize,
            experts=_EXPERTS,
            streamed=True,
            progress=steps.begin,
        )
        if loaded.companions is None:
            raise ConfigError(f"{model} is a program, not a checkpoint: name a folder of transformers")
        if loaded.declared is not None:
            raise ConfigError(
                f"{model} is rotated already ({', '.join(sorted(loaded.declared.rotations)[:2])}, …), as its "
                "config.json declares: name the original"
            )
        check_not_online(loaded)
        check_names(asked.scheme, loaded.program)
        with kept_for_another_try(draft), still_the_same(loaded.files, steps):
            placed = replace(loaded, program=on_device(loaded.program, there))
            # what is written is the original's graph: where nothing is rounded, one proof is of both
            at_once = certify and asked.scheme is None
            result = rotated(placed.program, config, steps, certify=certify and not at_once, exact=at_once)
            declares = asked.written == "compressed-tensors"
            check_rotation(loaded, result, declared=declares)
            transforms = online_transforms(result.program) if declares else ()
            if at_once:
                steps.start("certify the checkpoint")
                try:
                    certify_as_exported(placed, result, transforms)
                except VerificationError:
                    rotated(placed.program, config, steps)  # which names the space, if it is the rotation's fault
                    raise
                result = replace(result, exact={})  # it holds the original
            result = _quantized(asked, loaded, result, draft, f"{dtype}, {there.type}", steps)
            result = replace(result, program=on_device(result.program, HOST))
            if certify and not at_once:
                steps.start("certify the checkpoint")
                check_same_architecture(loaded, result, transforms)
            steps.start("write")
            weights = {} if result.quantization is None else result.quantization.weights
            report = write_layout(draft.folder, asked.written, result, transforms)
            made = described(loaded, result, report.quantization)
            report = replace(report, untied=_is_tied(loaded) and not _is_tied(made))

            def tried() -> list[FolderTrial]:
                if not certify:
                    return [FolderTrial("transformers", "all", reason="switched off")]
                steps.start("try the checkpoint")
                return tried_layout(asked.written, draft.folder, result.program, made, weights)

            files = [path.name for path in report.files]
            about = write_companions(
                made, result, {"layout": {"name": asked.written, "transforms": len(transforms)}}, files, draft, tried
            )
        steps.finish()
        return result, Written(draft.in_place(report), *about, loading=loaded.report)


def _quantized(
    asked: CheckpointRequest, loaded: LoadedModel, result: Result, draft: Draft, dtype: str, steps: Steps
) -> Result:
    """Round the weights where that is asked for. Codes are kept in files, from which a run that was stopped goes on."""
    scheme = asked.scheme
    if scheme is None:
        return result
    text = None if asked.calibration is None else Path(asked.calibration)
    run = run_of(loaded, asked.config, scheme, text, asked.windows, target=f"{asked.written}, {dtype}")
    kept = replace(result, program=kept_on_disk(result.program, draft.folder.parent))
    work = KeptWork.of(draft.work, run)
    return quantized(kept, loaded, scheme, text, steps, asked.windows, work)


def _is_tied(loaded: LoadedModel) -> bool:
    """Whether the configuration says that head and token table are one."""
    assert loaded.companions is not None
    return bool(loaded.companions.config.get_text_config().tie_word_embeddings)

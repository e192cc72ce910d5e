"""The last step of an export: the written folder is opened in every runtime it is for, generates, and is judged.

    draft  ->  a process per runtime: a prompt, a padded batch, a next turn, a prompt past the window  ->  the program

The program judges every token: it reads the same text from an empty cache, without padding, and its own logits say how
far the chosen token is behind the likeliest. Where the runtime hands out logits, they are compared as well. A runtime
that cannot run the folder ends the export, and nothing appears.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from spinpass.certificate import FileComparison
from spinpass.errors import ExportError, VerificationError, first_line
from spinpass.evaluation import token_ids
from spinpass.execution import InputRole, UserInput, continued_inputs, token_input, user_inputs
from spinpass.exporters import CERTIFY_BYTES, resident_bytes
from spinpass.formats import pte_path, xml_path
from spinpass.loading import LONGEST_TEXT, Companions, LoadedModel, text_limits
from spinpass.progress import Steps
from spinpass.runtime import (
    GENAI_CONFIG,
    NoKernelError,
    Turns,
    continued,
    genai_tokens,
    outputs,
    special_tokens,
)

from .judge import FolderTrial, Judge, distance

NEW = 4
"""How many tokens a runtime chooses after each turn."""

_PROMPT, _ROWS, _TURN = 9, (3, 9, 6), 4  # tokens
_BEYOND = 6  # tokens past a window, which is not tried where it is longer than a text
_TEXT = (
    "The sun had gone down behind the hills, and the road to the village lay quiet. A boy with a lamp came from the "
    "mill and asked: who goes there at this hour? Only a traveller, said the man, and he put his bag down on the wall. "
)
_RUNTIMES = {"onnxruntime": "onnxruntime", "OrtModel": "onnxruntime", "genai": "onnxruntime_genai",
             "executorch": "executorch", "openvino": "openvino"}  # fmt: skip


def try_folder(
    loaded: LoadedModel,
    program: ExportedProgram,
    folder: Path,
    steps: Steps,
    *,
    bound: float | None = None,
    why: str = "",
) -> list[FolderTrial]:
    """Open a folder in the runtimes it is for, generate, and compare with the program.

    Args:
        loaded: the model, whose tokenizer and configuration make the texts.
        program: what the file should compute, logits of every token included.
        folder: it holds ``model.onnx``, ``openvino_model.xml`` or ``model.pte``, and what lies beside it.
        steps: told what begins.
        bound: of :mod:`.judge`, where the file rounds as it runs; None where it does not.
        why: the reason that nothing is compared, though all is run; empty where it is.

    Raises:
        ExportError: a runtime that is here cannot open or run the folder.
        VerificationError: a runtime chooses other tokens, or computes other logits, than the program.
    """
    return _tried(loaded, program, folder, _runtimes(folder), steps, bound, why)


def try_unrounded(
    loaded: LoadedModel,
    program: ExportedProgram,
    path: Path,
    steps: Steps,
    *,
    bound: float | None = None,
    runtime: str = "onnxruntime",
) -> list[FolderTrial]:
    """Compare a model without the rounding that its operators do as they run: in ONNX Runtime ``path`` is a copy of the
    file, see :func:`spinpass.exporters.onnx.unrounded_copy`, and ``"openvino, unrounded"`` is told not to round.

    Raises what :func:`try_folder` raises.
    """
    found = _tried(loaded, program, path, {runtime: ""}, steps, bound, "")
    name = f"{runtime.partition(',')[0]}, unrounded"
    return [replace(each, runtime=name) for each in found if not each.reason]


def _tried(
    loaded: LoadedModel,
    program: ExportedProgram,
    path: Path,
    runtimes: Mapping[str, str],
    steps: Steps,
    bound: float | None,
    why: str,
) -> list[FolderTrial]:
    """Run a folder, or the model in it, in ``runtimes``, and judge it; see :func:`try_folder`."""
    folder = path if path.is_dir() else path.parent
    inputs = user_inputs(program)
    ids = token_input(inputs)
    if "executorch" not in runtimes and (ids is None or not _is_decoder(loaded, program, inputs)):
        return [_try_outputs(program, path, next(iter(runtimes)), steps, bound, why)]
    judge = Judge(program, bound)
    cases, left = _cases(loaded, judge.longest, None if ids is None else ids.bound, _padding(folder))
    padded = any(spec.role is InputRole.MASK for spec in inputs) and not loaded.reads_padding
    asked = {
        runtime: {case: turns for case, turns in cases.items() if _takes(runtime, turns, padded=padded)}
        for runtime, absent in runtimes.items()
        if not absent
    }
    steps.begin(f"try in {', '.join(asked)}")
    try:
        answers = continued(path, asked, NEW, torch.get_num_threads()) if asked else {}
    except NoKernelError as error:
        if not why:
            raise
        return [FolderTrial(runtime, "all", reason=first_line(error)) for runtime in asked]  # it is for other devices
    found = [FolderTrial(runtime, "all", reason=absent) for runtime, absent in runtimes.items() if absent]
    for runtime, each in answers.items():
        ends = special_tokens(folder)[1] if runtime == "genai" else ()
        for case in cases:
            if case not in each:
                found.append(FolderTrial(runtime, case, reason=_why_not(runtime, loaded)))
            elif why:
                found.append(FolderTrial(runtime, case, each[case].count, reason=why))
            else:
                found.append(judge(runtime, case, each[case], ends))
        if runtime == "genai" and loaded.companions is not None and loaded.companions.tokenizer is not None:
            found.append(_same_tokens(loaded.companions.tokenizer, folder))
    return [*found, *(FolderTrial("all", case, reason=reason) for case, reason in left.items())]


def unjudged(program: ExportedProgram, *, certify: bool) -> str:
    """Return why a folder is run but not compared with its program; it is empty where it is."""
    if not certify:
        return "switched off"
    size = resident_bytes(program)
    return (
        f"{size:,} bytes of weights in memory are above the limit of {CERTIFY_BYTES:,}" if size > CERTIFY_BYTES else ""
    )


# -- what is tried -----------------------------------------------------------------------------------------------------


def _cases(
    loaded: LoadedModel, longest: int | None, rows: int | None, pad: int | None
) -> tuple[dict[str, Turns], dict[str, str]]:
    """Return the texts by case, and of the cases that there are none for the reason.

    Args:
        loaded: its tokenizer and configuration make the texts.
        longest: a text that the program takes.
        rows: how many tokens there are.
        pad: a token that no text may have.
    """
    config = None if loaded.companions is None else loaded.companions.config
    positions = None if loaded.companions is None else loaded.companions.positions
    limit = min((n for n in (positions, longest) if n is not None), default=sys.maxsize)
    wanted = {"prompt": [[_PROMPT]], "padded batch": [list(_ROWS)], "next turn": [[_PROMPT], [_TURN]]}
    wanted |= {f"past {n} tokens": [[n + _BEYOND]] for n in ([] if config is None else text_limits(config))}
    if limit < _PROMPT + NEW:
        wanted["prompt"] = [[max(limit - NEW, 1)]]
    lengths = {case: sum(max(turn) + NEW for turn in turns) for case, turns in wanted.items()}
    most = LONGEST_TEXT + _BEYOND + NEW
    left = {case: f"the model ends at {limit} tokens" for case, length in lengths.items() if length > limit}
    left |= {case: "longer than what is tried here" for case, length in lengths.items() if length > most}
    chosen = {case: turns for case, turns in wanted.items() if case not in left}
    text = _text(loaded.companions, rows, max((max(map(max, turns)) for turns in chosen.values()), default=0), pad)
    cases: dict[str, Turns] = {
        case: [[text[row : row + length] for row, length in enumerate(turn)] for turn in turns]
        for case, turns in chosen.items()
    }
    return cases, left


def _text(companions: Companions | None, rows: int | None, length: int, pad: int | None) -> list[int]:
    """Return token ids of English where the model's tokenizer reads it, else any that the table has; no padding."""
    tokenizer = None if companions is None else companions.tokenizer
    if tokenizer is not None:
        ids = [token for token in token_ids(tokenizer)(_TEXT) if token != pad]
        if len(set(ids)) >= _PROMPT and (rows is None or max(ids) < rows):
            return (ids * (length // len(ids) + 1))[: length + len(_ROWS)]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(0, rows or 2, (2 * (length + len(_ROWS)),), generator=generator, device="cpu").tolist()
    return [token for token in drawn if token != pad]


def _padding(folder: Path) -> int | None:
    """Return the token that GenAI fills rows up with, where the folder is for it: it cannot be part of a text."""
    return special_tokens(folder)[0] if (folder / GENAI_CONFIG).is_file() else None


def _is_decoder(loaded: LoadedModel, program: ExportedProgram, inputs: Sequence[UserInput]) -> bool:
    """Say whether the file is to generate: a model's with a cache is, a program of one's own where it can be fed."""
    state = continued_inputs(program)
    known = (InputRole.LOOKUP, InputRole.MASK, InputRole.POSITION)
    fed = [spec for spec in inputs if spec.role in known or spec.name in state]
    grows = any(not isinstance(size, int) for spec in fed if spec.name in state for size in spec.shape[1:])
    return bool(state) and (loaded.companions is not None or (grows and len(fed) == len(inputs)))


def _runtimes(folder: Path) -> dict[str, str]:
    """Return the runtimes that the folder is for, and why one cannot be asked; the reason is empty where it can."""
    names = ["onnxruntime", "OrtModel"]
    if pte_path(folder).is_file():
        names = ["executorch"]
    elif xml_path(folder).is_file():
        names = ["openvino"]
    if (folder / GENAI_CONFIG).is_file():
        names.append("genai")
    return {name: "" if find_spec(_RUNTIMES[name]) else f"{_RUNTIMES[name]} is not installed" for name in names}


def _takes(runtime: str, turns: Turns, *, padded: bool) -> bool:
    """Say whether a runtime is given these texts: one that keeps one cache takes no batch, and padding needs a mask,
    which a ``padded`` program takes."""
    if runtime == "executorch":
        return len(turns[0]) == 1
    return padded or runtime == "OrtModel" or len({len(row) for row in turns[0]}) == 1


def _same_tokens(tokenizer: Any, folder: Path) -> FolderTrial:
    """Say whether GenAI's own tokenizer reads a text as the model's does: where not, GenAI is to be given tokens."""
    expected = list(tokenizer(_TEXT, verbose=False)["input_ids"])
    try:
        same = genai_tokens(folder, _TEXT) == expected
    except ExportError as error:
        reason = f"GenAI cannot read this kind of tokenizer ({error}): give it the tokens of transformers' own"
    else:
        reason = "" if same else "GenAI makes other tokens of a text than transformers does: give it those"
    case = "its own tokenizer"
    return FolderTrial("genai", case, reason=reason) if reason else FolderTrial("genai", case, len(expected), 0.0, 0.0)


def _why_not(runtime: str, loaded: LoadedModel) -> str:
    if runtime == "executorch":
        return "its cache holds one sequence"
    reads = "padding changes what the model makes of a text: run rows of different length one by one"
    return reads if loaded.reads_padding else "the program takes no attention mask"


def _try_outputs(
    program: ExportedProgram, path: Path, runtime: str, steps: Steps, bound: float | None, why: str
) -> FolderTrial:
    """Run a file that is no decoder once, and compare all that it returns."""
    steps.begin(f"try in {runtime}")
    compared = FileComparison.of(program)
    results = outputs(path, compared.fed, torch.get_num_threads())
    if why:
        return FolderTrial(runtime, "one call", reason=why)
    if bound is not None:
        pairs = zip(compared.expected, results.values(), strict=True)
        worst = max(distance(a.float(), b.float()) for a, b in pairs if a.is_floating_point())
        if not worst <= bound:
            raise VerificationError(
                f"the written folder does not compute what the program does: an output is {worst:.1e} away, allowed "
                f"{bound:.0e}"
            )
        return FolderTrial(runtime, "one call", 0, worst, bound)
    certificate = compared.certificate([""] * len(compared.fed), list(results), results.values(), "written folder")
    certificate.raise_if_failed()
    output = certificate.worst
    return FolderTrial(runtime, "one call", 0, output.difference.relative, output.bound)

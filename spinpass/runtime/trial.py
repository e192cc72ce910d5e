"""A model file opened and run in a process of its own, as a user would; what it answers goes back through a pipe.

    this process  ->  request  ->  another python  ->  runtime  ->  tokens and logits  ->  this process

A runtime that dies takes nobody with it, and nothing that the exporting process holds can help the file. The child
writes no file: a parent that is killed leaves nothing behind.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, DamageError, ExportError, SpinpassError, VerificationError
from spinpass.formats import model_path, xml_path

from .decoding import Graph
from .onnx_session import NoKernelError
from .openvino_decoder import OpenVINODecoder
from .openvino_session import CompiledModel
from .ort_model import OrtModel

Turns = Sequence[Sequence[Sequence[int]]]
"""By turn, the tokens of every row that are read before the model goes on. Only one row has several turns."""


@dataclass(frozen=True)
class Answer:
    """What a runtime made of one case.

    Args:
        tokens: by row, all of them: those given and those chosen.
        chosen: by row, the places of those chosen.
        logits: by row, float32 (chosen, vocabulary), what each was chosen from; None where the runtime does not say.
    """

    tokens: list[list[int]]
    chosen: list[list[int]]
    logits: list[Tensor] | None

    @property
    def count(self) -> int:
        """How many tokens were chosen."""
        return sum(map(len, self.chosen))


def continued(
    path: Path, cases: Mapping[str, Mapping[str, Turns]], new: int, threads: int
) -> dict[str, dict[str, Answer]]:
    """Let runtimes continue texts greedily, past end tokens, all in one other process.

    Args:
        path: the folder, or a model in it.
        cases: by runtime, the turns of each case by name. The runtimes are ``onnxruntime`` (step by step), ``OrtModel``
            (``generate``; both pad batches on the left), ``genai`` (which pads on the right and chooses no end tokens),
            ``openvino`` and ``openvino, unrounded`` (which is told not to round), and ``executorch``.
        new: how many tokens follow each turn.
        threads: how many of the CPU.

    Raises:
        ExportError, NoKernelError, VerificationError, ConfigError: as the runtime's own classes here; ExportError also
            where the process dies.
    """
    plain = {
        runtime: {name: [[list(row) for row in rows] for rows in turns] for name, turns in each.items()}
        for runtime, each in cases.items()
    }
    found = _asked({"path": str(path), "cases": plain, "new": new, "threads": threads})
    return {runtime: {name: Answer(*answer) for name, answer in each.items()} for runtime, each in found.items()}


def outputs(path: Path, inputs: Sequence[Tensor], threads: int) -> dict[str, Tensor]:
    """Run a file that is no decoder in ONNX Runtime, or that of a folder in OpenVINO, and return its outputs by name.

    Raises:
        ExportError: the runtime cannot load or run it, or dies. VerificationError: see :func:`continued`.
    """
    found: dict[str, Tensor] = _asked({"path": str(path), "inputs": list(inputs), "threads": threads})
    return found


# -- the parent --------------------------------------------------------------------------------------------------------

# isolated: neither the current folder nor the environment says what is imported, but the paths of this process
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from spinpass.runtime.trial import child; child()"
_KINDS = {kind.__name__: kind for kind in (ConfigError, DamageError, ExportError, NoKernelError, VerificationError)}
_REPORT = 2**10  # characters of what a dying process says


def _asked(request: dict[str, Any]) -> Any:
    """Return what the child answers; raise what it raises."""
    sent = io.BytesIO()
    torch.save(request, sent)
    command = [sys.executable, "-I", "-c", _CHILD, *map(os.path.abspath, sys.path)]
    done = subprocess.run(command, input=sent.getvalue(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-_REPORT:].strip()
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ExportError(f"the process that ran the written folder died ({how}): {said or 'without a word'}")
    kind, found = torch.load(io.BytesIO(done.stdout), weights_only=True)
    if kind in _KINDS:
        raise _KINDS[kind](found)
    return found


# -- the child ---------------------------------------------------------------------------------------------------------


def child() -> None:
    """Answer the request on standard input on standard output; runtimes that print get standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    torch.set_num_threads(request["threads"])
    try:
        answer: tuple[str, Any] = ("", _answered(request))
    except SpinpassError as error:
        kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS)
        answer = (kind, str(error))
    with answers:
        torch.save(answer, answers)


def _answered(request: dict[str, Any]) -> Any:
    path, threads = Path(request["path"]), request["threads"]
    if "inputs" in request:
        return _outputs(path, request["inputs"], threads)
    found: dict[str, dict[str, _Answer]] = {}
    for runtime, cases in request["cases"].items():
        print(f"running {runtime}", flush=True)  # what the parent tells where the next line kills this process
        run = _RUNTIMES[runtime](path, threads)
        found[runtime] = {name: run(turns, request["new"]) for name, turns in cases.items()}
    return found


def _outputs(path: Path, inputs: list[Tensor], threads: int) -> dict[str, Tensor]:
    if xml_path(path).is_file():
        model = CompiledModel(xml_path(path), threads=threads)
        return dict(zip(model.outputs, model.run(inputs), strict=True))
    from .onnx_session import from_ort, open_session, run_session, to_ort

    session = open_session(model_path(path), threads=threads)
    names = [given.name for given in session.get_inputs()]
    results = run_session(session, {name: to_ort(value) for name, value in zip(names, inputs, strict=True)})
    return {output.name: from_ort(result) for output, result in zip(session.get_outputs(), results, strict=True)}


_Answer = tuple[list[list[int]], list[list[int]], list[Tensor] | None]
_Run = Callable[[Turns, int], _Answer]


def _stepped(graph: Graph, turns: Turns, new: int) -> _Answer:
    """Every turn, and every token after it, in a call of its own. Shorter rows are padded in front."""
    rows = len(turns[0])
    tokens: list[list[int]] = [[] for _ in range(rows)]
    chosen: list[list[int]] = [[] for _ in range(rows)]
    logits: list[list[Tensor]] = [[] for _ in range(rows)]
    state = graph.start(rows)
    last: list[list[int]] = [[] for _ in range(rows)]  # chosen, but not read yet
    for turn in turns:
        ids, mask = _left_padded([[*unread, *row] for unread, row in zip(last, turn, strict=True)])
        for row, given in enumerate(turn):
            tokens[row] += given
        for _ in range(new):
            found = graph.step(ids, state, mask)[:, -1].float()
            ids, mask = found.argmax(1, keepdim=True), None
            for row in range(rows):
                chosen[row].append(len(tokens[row]))
                tokens[row].append(int(ids[row]))
                logits[row].append(found[row])
        last = ids.tolist()
    return tokens, chosen, [torch.stack(each) for each in logits]


def _left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device="cpu")
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device="cpu")
    return ids, None if bool(mask.all()) else mask


def _step_by_step(path: Path, threads: int) -> _Run:
    model = OrtModel.from_pretrained(path, threads=threads)
    return lambda turns, new: _stepped(model.graph, turns, new)


def _generated(path: Path, threads: int) -> _Run:
    model = OrtModel.from_pretrained(path, threads=threads, generation_config={})  # the likeliest tokens are judged

    def run(turns: Turns, new: int) -> _Answer:
        rows: list[list[int]] = [[] for _ in turns[0]]
        for turn in turns:
            ids, mask = _left_padded([[*row, *more] for row, more in zip(rows, turn, strict=True)])
            found = model.generate(ids, mask, max_new_tokens=new, eos_token_id=())
            rows = [[*row, *more, *line[ids.shape[1] :].tolist()] for row, more, line in zip(rows, turn, found)]
        return rows, _places(turns, new), None

    return run


def _in_genai(path: Path, threads: int) -> _Run:
    from .genai_session import GenaiModel

    model = GenaiModel(path)

    def run(turns: Turns, new: int) -> _Answer:
        return model.continued(turns, new), _places(turns, new), None

    return run


def _in_executorch(path: Path, threads: int) -> _Run:
    from .pte_decoder import PteDecoder

    decoder = PteDecoder(path)
    return lambda turns, new: _stepped(decoder.graph, turns, new)


def _in_openvino(path: Path, threads: int) -> _Run:
    decoder = OpenVINODecoder(path, threads=threads)
    return lambda turns, new: _stepped(decoder.graph, turns, new)


def _in_openvino_unrounded(path: Path, threads: int) -> _Run:
    decoder = OpenVINODecoder(path, threads=threads, rounds=False)
    return lambda turns, new: _stepped(decoder.graph, turns, new)


def _places(turns: Turns, new: int) -> list[list[int]]:
    """Return where the chosen tokens lie in each row: behind every turn."""
    given = [[len(turn[row]) for turn in turns] for row in range(len(turns[0]))]
    starts = [[sum(row[: turn + 1]) + turn * new for turn in range(len(row))] for row in given]
    return [[place for start in row for place in range(start, start + new)] for row in starts]


_RUNTIMES: dict[str, Callable[[Path, int], _Run]] = {
    "onnxruntime": _step_by_step,
    "OrtModel": _generated,
    "genai": _in_genai,
    "executorch": _in_executorch,
    "openvino": _in_openvino,
    "openvino, unrounded": _in_openvino_unrounded,
}

"""What the other process does, see :mod:`.elsewhere`: it opens files in their runtimes, and runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import SpinpassError
from spinpass.formats import model_path, xml_path

from .decoder import Decoder
from .decoding import Graph
from .elsewhere import message_of, received, send
from .opened import open_decoder
from .openvino_decoder import OpenVINODecoder
from .openvino_session import CompiledModel
from .ort_model import OrtModel

_Turns = Sequence[Sequence[Sequence[int]]]  # see :data:`.trial.Turns`


def serve() -> None:
    """Answer the requests on standard input on standard output; runtimes that print get standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    served = Served()
    while (request := received(sys.stdin.buffer)) is not None:
        if request["threads"] is not None:
            torch.set_num_threads(request["threads"])
        try:
            answer = "", served.answer(request)
        except SpinpassError as error:
            answer = message_of(error)
        send(answers, answer)


@dataclass
class Served:
    """What is open, by where it lies."""

    files: dict[str, Any] = field(default_factory=dict)
    decoders: dict[str, Decoder] = field(default_factory=dict)
    logits: Tensor | None = None
    """Those that were computed last, until they have been asked for."""

    def answer(self, request: Mapping[str, Any]) -> Any:
        """Do what is requested; raise what the runtime's own classes raise."""
        path = Path(request["path"])
        match request["do"]:
            case "open":
                return self._opened(path, request["threads"], prepack=request["prepack"])
            case "run":
                return _run(self.files[str(path)], request["inputs"])
            case "open decoder":
                decoder = self.decoders[str(path)] = open_decoder(path, threads=request["threads"])
                return getattr(decoder, "context", None)
            case "logits":
                self.logits = None  # before there are others: they may be as large as a model
                self.logits = self.decoders[str(path)].logits(request["ids"])
                return list(self.logits.shape)
            case "rows of logits":
                return self._rows(request["first"], request["last"])
            case "generate":
                made = self.decoders[str(path)].generate(request["ids"], request["new"], end=request["end"])
                return vars(made)
            case "continue":
                return _continued(path, request)
            case _:
                return _run_once(path, request["inputs"], request["threads"])

    def _rows(self, first: int, last: int) -> Tensor:
        """Return rows of the last logits, which are gone with the last row."""
        assert self.logits is not None
        found = self.logits[first:last].clone()  # a view would be sent with all that it is a view of
        if last >= len(self.logits):
            self.logits = None
        return found

    def _opened(self, path: Path, threads: int | None, *, prepack: bool) -> Any:
        from .onnx_session import open_session

        session = self.files[str(path)] = open_session(path, threads=threads, prepack=prepack)
        return [(i.name, list(i.shape)) for i in session.get_inputs()], [o.name for o in session.get_outputs()]


def _run(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    from .onnx_session import from_ort, run_session, to_ort

    names = [given.name for given in session.get_inputs()]
    feed = {name: to_ort(value) for name, value in zip(names, inputs, strict=True)}
    return [from_ort(result) for result in run_session(session, feed)]


def _run_once(path: Path, inputs: Sequence[Tensor], threads: int) -> dict[str, Tensor]:
    if xml_path(path).is_file():
        model = CompiledModel(xml_path(path), threads=threads)
        return dict(zip(model.outputs, model.run(inputs), strict=True))
    from .onnx_session import open_session

    session = open_session(model_path(path), threads=threads)
    return dict(zip([output.name for output in session.get_outputs()], _run(session, inputs), strict=True))


def _continued(path: Path, request: Mapping[str, Any]) -> dict[str, dict[str, _Answer]]:
    found: dict[str, dict[str, _Answer]] = {}
    for runtime, cases in request["cases"].items():
        print(f"running {runtime}", flush=True)  # what the parent tells where the next line kills this process
        found[runtime] = _answers(_RUNTIMES[runtime](path, request["threads"]), cases, request["new"])
    return found


def _answers(run: _Run, cases: Mapping[str, _Turns], new: int) -> dict[str, _Answer]:
    """Run all cases. The runtime is let go on return, before the next one takes as much memory."""
    return {name: run(turns, new) for name, turns in cases.items()}


_Answer = tuple[list[list[int]], list[list[int]], list[Tensor] | None]
_Run = Callable[[_Turns, int], _Answer]


def _stepped(graph: Graph, turns: _Turns, new: int) -> _Answer:
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

    def run(turns: _Turns, new: int) -> _Answer:
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

    def run(turns: _Turns, new: int) -> _Answer:
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


def _places(turns: _Turns, new: int) -> list[list[int]]:
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

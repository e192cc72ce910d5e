"""What each step of an export costs, in time and memory, by how much there is to do; fitted on measured runs.

Time is a sum of kinds of work, each divided by the machine's rate: calls of operators, for all of the graph's tensors,
folds and copies of values, products. Memory is the largest of what stands together.

| stands in memory | bytes |
|---|---|
| the graph | some for each tensor |
| a program that is not read from files | its constants; twice when it was rotated |
| a certificate | the largest constant in float64, or blocks of it; one that is rotated on both sides; logits |
| GPTQ at one weight (out, in) | 16·in² + 5·out·in + 45·k·in + 24·k·groups² of k rows, what windows hold around it |
| tables | their codes, twice |
| a file that is tried | twice its bytes, in the runtime |
| learning | at least what is learned with its moments, the constants it makes, the logits of a window |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spinpass.evaluation import CALIBRATION_LENGTH

from .machine import Rates
from .room import SESSION_FLOATS, SESSION_INTEGERS
from .workload import Workload

_TRIED = 400  # tokens that the written folder reads and writes for its trial
_SCORED = 8 * 512  # tokens of the card
_DRAWN = 64  # tokens of a certificate
_COMPARED = 24 * _DRAWN  # bytes for each word of the vocabulary, of what the programs of a certificate return
_WRITTEN = 24  # bytes for each weight of a matrix that is rotated on both sides, as it is written
_TABLE = 3.5  # bytes for each weight of a table, of codes that are put together
_LARGE = 1 << 26  # bytes above which a constant is computed in blocks
_BLOCKS = 100 << 20  # bytes of blocks, in float64, with what is made of them
_SEARCHED = 6_000  # how often a weight is passed over while the range of its group is searched
_PASSED = 12_000  # how often a weight is passed over, column by column within its block
_TRAINED, _WIDE = 20.0, 1 << 10  # bytes of a scale that is trained; weights of a group that is a whole row, about
_RUNS = 6  # forward passes that learning from a window takes: the original's, the student's, its backward pass twice
_BLOCK = 0.1  # of all weights, in a block
_FEW, _CODED = 1024, 5.0  # rows that GPTQ rounds at once; bytes of a weight as it is read, and of its code
_ROOM = 50 << 20  # bytes of what is made of a constant in float64
_PACKED = 2.3  # bytes for each weight, of codes that a file is written from
_LOGITS = 24  # bytes for each logit of a window that is scored: both models', copies, their softmax in blocks
_TRANSLATED = 0.8e6  # bytes of an ONNX graph for each tensor
_GRAPH, _TENSOR = 80 << 20, 0.4e6  # bytes of a program and what runs it


@dataclass(frozen=True)
class _Cost:
    """The time of a step: seconds at any size, and work of each kind.

    Args:
        fixed: calls for any model.
        calls: calls for each tensor.
        folds, copies, hashes: how many times each value is folded, copied as float32, and hashed as stored.
        tokens: that the model reads in float32.
        wide: that it reads in float64.
    """

    fixed: float = 0.0
    calls: float = 0.0
    folds: float = 0.0
    copies: float = 0.0
    hashes: float = 0.0
    tokens: float = 0.0
    wide: float = 0.0

    def seconds(self, work: Workload, rates: Rates) -> float:
        """Return the time on a machine."""
        return (
            (self.fixed + self.calls * work.tensors) / rates.calls
            + self.folds * work.values / rates.fold
            + self.copies * work.values * 4 / rates.copy
            + self.hashes * work.stored * (1 / rates.hash + 1 / rates.read)
            + 2 * work.values * (self.tokens / rates.gemm32 + self.wide / rates.gemm64)
        )


_COSTS = {
    "load": _Cost(fixed=2e5, calls=1e3, hashes=1),
    "export": _Cost(fixed=9e5, calls=36e3),
    "compare": _Cost(fixed=2e5, calls=6e3, tokens=_DRAWN),
    "plan": _Cost(fixed=2e4, calls=1.5e3),
    "rotate": _Cost(calls=1e3, folds=0.5),
    "certify": _Cost(fixed=2e5, calls=6e3, folds=6, wide=_DRAWN),
    "quantize": _Cost(fixed=1e5, calls=5e3),
    "learn": _Cost(fixed=1e5, calls=5e3),
    "onnx: translate": _Cost(fixed=4e5, calls=20e3),
    "onnx: write": _Cost(calls=5e2, folds=1, copies=2),
    "onnx: certify": _Cost(fixed=2e5, calls=3e3, folds=1, tokens=_DRAWN),
    "pack": _Cost(folds=1, copies=4),
    "try": _Cost(fixed=1.4e6, copies=4, tokens=2 * _TRIED),
    "score the file": _Cost(fixed=2e5, tokens=4 * _SCORED),
    "check the weights again": _Cost(hashes=1),
    "write": _Cost(fixed=1e5, calls=20e3, folds=1, copies=4),
}


def steps_of(work: Workload) -> list[str]:
    """Return the names of a run's steps, as they are told when they begin; of a trial the first word."""
    made: list[str] = []
    for rotates in [work.rotates, False] if work.compares else [work.rotates]:
        if rotates:
            made += ["plan", "rotate", *(["certify"] if work.certifies else [])]
        rounds = work.scheme is not None and not work.packs
        made += ["quantize", *(["learn"] if work.learns else [])] if rounds else []
        if work.target == "onnx":
            made += ["onnx: translate", "onnx: write", *(["onnx: certify"] if work.certifies else [])]
        else:
            made += ["write"]
        made += ["pack"] if work.copies else []
        made += ["try", "try"] if work.scheme is not None and work.target == "onnx" else ["try"]
        made += ["score the file"] if work.scheme is not None else []
    return ["load", "export", "compare", *made, "check the weights again"]


def seconds_of(step: str, work: Workload, rates: Rates) -> float:
    """Return the seconds of a step on a machine of these rates."""
    seconds = _COSTS[step].seconds(work, rates)
    if step == "learn":
        return seconds + _learning_seconds(work, rates)
    return seconds + _rounding_seconds(work, rates) if step == "quantize" else seconds


def _learning_seconds(work: Workload, rates: Rates) -> float:
    """Return the seconds in which a rounded program learns from the text, by how many runs each window takes."""
    assert work.scheme is not None and work.scheme.learn is not None
    settings = work.scheme.learn
    if settings.minutes is not None:
        return 60 * settings.minutes * len(settings.phases)
    tokens = work.tokens if settings.kinds == ("scales",) else (work.text or work.tokens)
    return 2 * (work.linear_values + work.table_values) * _RUNS * settings.rounds * tokens / rates.gemm32


def _rounding_seconds(work: Workload, rates: Rates) -> float:
    """Return the seconds in which weights are rounded, calibration included."""
    scheme = work.scheme
    assert scheme is not None and scheme.weights is not None
    searched = _SEARCHED * 4 / rates.copy  # for each weight
    if not work.tokens:
        return searched * work.values
    backwards = (scheme.average_bits is not None) + scheme.weighs_tokens  # a pass forward and back takes three runs
    run = 2 * work.linear_values * work.tokens / rates.gemm32 * (1 + 3 * backwards)
    if scheme.weights.method != "gptq":
        return run + searched * work.values
    sweeps = 0.0
    for (rows, columns), count in work.linears.items():
        flops32, flops64 = 20 * rows * columns**2, 11 * rows * columns**2
        moments = 2 * work.tokens * columns**2 / rates.gemm32
        factor = columns**3 / rates.cholesky
        each = _PASSED * rows * columns * 4 / rates.copy
        sweeps += count * (flops32 / rates.gemm32 + flops64 / rates.gemm64 + moments + factor + each)
    return run + sweeps + searched * work.table_values


def memory_of(step: str, work: Workload) -> int:
    """Return the most bytes that the process has in a step, beyond its imports."""
    graph = _GRAPH + _TENSOR * work.tensors
    held = work.merged if work.streams else work.values * work.width * _copies(step, work)
    return int(graph + held + max(_beside(step, work), default=0))


RUN = ("try", "score the file")
"""The steps in which a runtime has the file open, which are left out where the memory does not hold it."""

_BEFORE = ("load", "export", "compare", "plan")
_ROUNDED = ("quantize", "learn", "onnx: translate")
_THERE = ("rotate", "certify", "quantize", "learn")  # on another device, if there is one
_LATE = ("onnx: write", "onnx: certify", "pack", "write", "try", "score the file")


def _copies(step: str, work: Workload) -> int:
    """Return how often the constants of a program that is in memory are there: as loaded, rotated, rounded."""
    if step in _BEFORE or (work.elsewhere and step in _THERE):
        return 1
    rounds = work.scheme is not None
    return 1 + max(work.rotates, rounds) + (step in _ROUNDED and rounds and work.rotates)


def _beside(step: str, work: Workload) -> Iterator[float]:
    """Yield what stands beside the program at one moment or another of a step."""
    if work.elsewhere and step in _THERE:
        return
    if step == "load" and not work.streams:
        yield work.stored
    if step == "certify":
        yield _in_float64(work) + _COMPARED * work.vocabulary
    if step == "onnx: certify":
        yield (_in_float64(work) if work.streams else 2 * _in_float64(work)) + _COMPARED * work.vocabulary
    if step in ("onnx: translate", "onnx: write"):
        both_sides = _WRITTEN * work.widest if step == "onnx: write" and work.scheme is None and work.rotates else 0.0
        yield _TRANSLATED * work.tensors + both_sides
    if step == "quantize":
        yield from _of_rounding(work)
    if step == "learn":
        yield _of_learning(work)
    if step in _LATE:
        integers = work.scheme is not None or work.packs
        packed = _PACKED * work.values if work.scheme is not None and not work.streams else 0.0
        session = (SESSION_INTEGERS if integers else SESSION_FLOATS) * work.written + _ROOM if step in RUN else 0.0
        scored = _LOGITS * CALIBRATION_LENGTH * work.vocabulary if step == "score the file" else 0.0
        yield packed + session + scored


def _in_float64(work: Workload) -> float:
    """Return the bytes of the largest constant in float64, or of the blocks in which it is computed."""
    whole = 8.0 * work.largest + _ROOM
    both_sides = 16.0 * work.widest if work.rotates else 0.0
    blocks = min(whole, 3 * _BLOCKS) if work.streams and work.largest * work.width > _LARGE else whole
    return max(blocks, both_sides)


def _of_learning(work: Workload) -> float:
    """Return what learning takes at least: what lies between the layers for a backward pass comes on top."""
    scheme = work.scheme
    assert scheme is not None and scheme.weights is not None and scheme.learn is not None
    each = 2 * _TRAINED / (scheme.weights.group_size or _WIDE) if "scales" in scheme.learn.kinds else 0.0
    each += _TRAINED if "offsets" in scheme.learn.kinds else 0.0
    block = _BLOCK if scheme.learn.phases == ("local",) else 1.0
    values = work.linear_values + work.table_values
    return values * (1 + 4 * block + each) + _LOGITS * CALIBRATION_LENGTH / 2 * work.vocabulary


def _of_rounding(work: Workload) -> Iterator[float]:
    """Yield what rounding takes: at the end, where folded constants are cast, and of each kind of matrix."""
    scheme = work.scheme
    assert scheme is not None and scheme.weights is not None
    yield _in_float64(work) if work.streams else 2 * _in_float64(work)
    # at least: what lies between the layers for a backward pass comes on top
    if scheme.average_bits is not None or scheme.weighs_tokens:
        yield _LOGITS * CALIBRATION_LENGTH / 2 * work.vocabulary
    gptq = scheme.weights.method == "gptq" and bool(work.tokens)
    for rows, columns in work.linears:
        groups = columns // (scheme.weights.group_size or columns)
        few = min(rows, _FEW)
        swept = 45.0 * few * columns + 24.0 * few * groups**2 + _CODED * rows * columns
        at_once = swept if gptq else 30.0 * min(rows * columns, _FEW * columns) + _CODED * rows * columns
        hessian = 16.0 * columns**2 if gptq else 0.0
        streams = 4.0 * work.tokens * (2 * work.hidden + 4 * columns)
        yield streams + hessian + at_once
    for rows, columns in work.tables:
        yield _TABLE * rows * columns + _ROOM

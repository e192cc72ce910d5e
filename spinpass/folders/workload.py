"""How much there is to do in an export: what is asked for, times the shapes in the headers of the model's files.

Matrices whose rows are as many as the vocabulary are tables; the others are read by linear layers. Nothing is known by
its name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spinpass.evaluation import CALIBRATION_LENGTH
from spinpass.graph import HOST
from spinpass.loading import StoredModel
from spinpass.quantization import QuantizationConfig, Weights

from .request import ExportRequest

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED = {2: 2, 3: 4, 4: 4, 8: 8}  # bits that codes take in a file
_SCALE = 2  # bytes
_NARROW = 16  # rows and columns of a matrix that is worth rounding, at least
_FEWER = (8, 4, 1)  # windows of a shorter text
_CHARACTERS = 4  # bytes of a token of text, about
_UNKNOWN = (1024, 4)  # of a program whose shapes are not known: its width, and how many times as many rows

CountedShapes = dict[tuple[int, int], int]
"""By shape (out, in), how many there are."""


@dataclass(frozen=True)
class Workload:
    """The numbers that memory and time depend on.

    Args:
        values: weights of the model.
        stored: bytes of its files.
        files: where they are.
        known: whether the shapes are those of a header.
        streams: the weights stay in their files.
        merged: bytes of those that do not, as loading puts them together.
        elsewhere: what is folded and rounded stands in the memory of another device.
        target: of the export.
        width: bytes of a weight in the program.
        tensors: how many of them have more than one value, which says how large the graph is.
        linears: matrices that linear layers read; those of a stack one by one.
        tables: matrices of the vocabulary.
        tokens: of calibration, all windows together.
        text: tokens of the whole calibration text, about.
        rotates, certifies, compares: what is asked for.
        packs: the weights are packed from a file of floats (``--int4``).
        copies: there are intermediate files of floats.
        scheme: how weights are rounded, None where they are not.
    """

    values: int
    stored: int
    files: tuple[Path, ...]
    known: bool
    streams: bool
    merged: int
    elsewhere: bool
    target: str
    width: int
    tensors: int
    linears: CountedShapes
    tables: CountedShapes
    tokens: int
    text: int
    rotates: bool
    certifies: bool
    compares: bool
    packs: bool
    copies: bool
    scheme: QuantizationConfig | None

    @classmethod
    def of(
        cls, request: ExportRequest, stored: StoredModel, config: Any = None, windows: int | None = None
    ) -> Workload:
        """Count what a request asks for.

        Args:
            request: what is asked for.
            stored: what the headers of the model's files say.
            config: that of transformers; None where there is none.
            windows: how many windows calibrate; None for as many as are asked for, or the most by default.
        """
        text = None if config is None else config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None) or max((s[0] for s in stored.shapes if len(s) == 2), default=0)
        matrices = [s for s in stored.shapes if len(s) > 1 and min(s[-2:]) >= _NARROW]
        tables = Counter((s[0], s[1]) for s in matrices if len(s) == 2 and s[0] == vocabulary)
        linears: Counter[tuple[int, int]] = Counter()
        for shape in matrices:
            if len(shape) > 2 or shape[0] != vocabulary:
                linears[shape[-2], shape[-1]] += math.prod(shape[:-2])
        reads = request.calibration is not None
        count = windows or request.calibration_windows or request.most_windows
        dtype = str(getattr(config, "dtype", "float16")).removeprefix("torch.")
        to_onnx, trusted = request.to == "onnx", request.trust_remote_code or request.dequantize
        return cls(
            values=stored.values, stored=stored.bytes, files=stored.files, known=bool(matrices),
            streams=stored.streams and to_onnx and not trusted, merged=stored.merged,
            elsewhere=request.device != HOST, target=request.to,
            width=_BYTES.get(dtype if request.dtype == "auto" else request.dtype, 2),
            tensors=sum(math.prod(shape) > 1 for shape in stored.shapes), linears=dict(linears), tables=dict(tables),
            tokens=count * CALIBRATION_LENGTH if reads else 0, text=_tokens_of(request.calibration),
            rotates=request.config is not None,
            certifies=request.certify, compares=request.compare, packs=request.int4,
            copies=request.int4 or (to_onnx and request.kv_cache is not None), scheme=_rounding(request),
        )  # fmt: skip

    @property
    def trains(self) -> bool:
        """Whether a step needs gradients of the whole model."""
        asked = self.scheme
        return asked is not None and (asked.learn is not None or asked.average_bits is not None or asked.weighs_tokens)

    @property
    def learns(self) -> bool:
        """Whether the rounded program learns."""
        return self.scheme is not None and self.scheme.learn is not None

    @property
    def widest(self) -> int:
        """Weights of the largest matrix that a linear layer reads."""
        return max((rows * columns for rows, columns in self.linears), default=0)

    @property
    def reads(self) -> int:
        """How often the model's files are read: hashed, looked through, certified, rounded or written, hashed again."""
        return 4 if self.streams else 3

    def smaller(self) -> Iterator[tuple[str, Workload]]:
        """Yield settings that take less memory, those first that change the result least, and what is to do then."""
        scheme, now = self.scheme, self
        if scheme is not None and scheme.weights is not None:
            if self.trains:
                weights = replace(scheme.weights, fisher=False)
                quick = replace(scheme, weights=weights, learn=None, average_bits=None, mixed_rows=False)
                now = replace(now, scheme=quick)
                yield "--recipe quick, which learns nothing", now
            for windows in _FEWER:
                if 0 < windows * CALIBRATION_LENGTH < now.tokens:
                    now = replace(now, tokens=windows * CALIBRATION_LENGTH)
                    yield f"a shorter text, --samples {windows}", now
            if now.tokens:
                plain = QuantizationConfig(weights=replace(scheme.weights, method="rtn"), embedding=scheme.embedding)
                now = replace(now, tokens=0, scheme=plain)
                yield "--recipe plain, which rounds to nearest", now
        if self.width > _BYTES["float16"]:
            yield "--dtype float16", replace(now, width=_BYTES["float16"])

    @property
    def largest(self) -> int:
        """Values of the largest constant that is read at once; 0 where no shape is known."""
        return max((math.prod(shape) for shape in (*self.linears, *self.tables)), default=0)

    @property
    def table_values(self) -> int:
        """Values of all tables."""
        return _values(self.tables)

    @property
    def linear_values(self) -> int:
        """Values of all weights of linear layers."""
        return _values(self.linears)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return max((columns for _, columns in self.tables), default=_UNKNOWN[0])

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return max((rows for rows, _ in self.tables), default=self.hidden * _UNKNOWN[1])

    @property
    def written(self) -> int:
        """Bytes of the weights in the folder."""
        floats = self.values * self.width
        if self.scheme is None:
            return floats
        made = 0.0
        for matrices, scheme in ((self.linears, self.scheme.weights), (self.tables, self.scheme.embedding)):
            if scheme is not None:
                bits = self.scheme.average_bits if matrices is self.linears else None
                made += _values(matrices) * (_stored_bits(scheme, bits) / 8 - self.width)
        return int(floats + made)

    @property
    def intermediate(self) -> int:
        """Bytes beside the folder while it is made: a file of floats, or the codes of what is rounded."""
        kept = self.linear_values + self.table_values if self.scheme is not None and not self.copies else 0
        return (self.values * self.width if self.copies else 0) + kept


def _tokens_of(text: str | Path | None) -> int:
    """Return about how many tokens a text in a file has; 0 for what is no file."""
    if text is None or not Path(text).is_file():
        return 0
    return Path(text).stat().st_size // _CHARACTERS


def _values(matrices: CountedShapes) -> int:
    return sum(count * rows * columns for (rows, columns), count in matrices.items())


def _rounding(request: ExportRequest) -> QuantizationConfig | None:
    if request.int4:
        return QuantizationConfig(weights=Weights(4, 32, method="rtn"), embedding=None)
    scheme = request.scheme
    return scheme if scheme is not None and scheme.weights is not None else None


def _stored_bits(scheme: Weights, average: float | None) -> float:
    bits = average or _STORED[scheme.bits]
    return bits + (8 * _SCALE + (0 if scheme.symmetric else bits)) / (scheme.group_size or 1 << 10)

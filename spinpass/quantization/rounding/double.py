"""Double quantization: the scales and zero points of a weight's groups are codes too, with statistics of their own.

    s = (qscales − qscales_zeros)·qscales_scales      o = (qzeros − qzeros_zeros)·qzeros_scales      w = q·s − o

in the layout of bitorch-engine's GBA layers (``MPQLinearBase``, ``use_gba_quant``). There are two forms of it:

- ``statistic`` has one byte ``qstatistic`` for every group, the scale's four bits above and the offset's four below.
  The offset o is a real number: z·s, rounded by itself. A symmetric weight has the same four bits twice and
  qzeros_scales = 2^(bits−1)·qscales_scales, so that zero stays exact.
- ``scales`` has eight bits ``qscales`` for the scale. Zero points stay integers z, and o = z·s.

| | ``qstatistic``, ``qscales`` | ``*_scales``, ``*_zeros`` | which values share statistics |
|---|---|---|---|
| mode 1 | (groups, out, 1) | (1, out, 1) | all groups of one output |
| mode 2 | (groups, blocks, size) | (groups, blocks, 1) | one group of ``size`` outputs side by side |

Two details are ours. Statistics are chosen as min … max of what shares them. Mode 1 of the form ``statistic`` has
``qzeros_*`` of (1, out, 1), where that project's layer allocates one per group; the formulas broadcast either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.operators import pack_words, unpack_words

from .grid import Codes, group_of

DoubleForm = Literal["statistic", "scales"]
_BITS = {"statistic": 4, "scales": 8}


@dataclass(frozen=True)
class ScaleStatistics:
    """The scales (or offsets) of a weight's groups as codes with statistics:  v = (q − zeros)·scales.

    Args:
        q: uint8, shaped as in the first column of the module's table.
        scales: float, shaped as in the second.
        zeros: float, likewise.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """v, (groups, out) in the statistics' dtype."""
        decoded = (self.q.to(self.scales.dtype) - self.zeros) * self.scales
        return decoded.reshape(len(decoded), -1)


@dataclass(frozen=True)
class DoubleQuantized:
    """A weight whose scales and offsets are codes as well.

    Args:
        q: the codes of the weight, uint8 (out, in).
        bits: their width.
        scales: those of the groups.
        offsets: those of the groups in the form ``statistic``, else None.
        zeros: the zero points in the form ``scales``, uint8 (out, groups), else None.
        index: as in :class:`.Codes`.
    """

    q: Tensor
    bits: int
    scales: ScaleStatistics
    offsets: ScaleStatistics | None = None
    zeros: Tensor | None = None
    index: Tensor | None = None

    def decoded(self) -> tuple[Tensor, Tensor]:
        """The scales and offsets (s, o), each (out, groups), in the statistics' dtype."""
        scales = self.scales.values().T
        if self.offsets is not None:
            return scales, self.offsets.values().T
        assert self.zeros is not None
        return scales, self.zeros.to(scales.dtype) * scales

    def dequantized(self) -> Tensor:
        """q·s − o, (out, in) in the statistics' dtype: (q − z)·s in the form ``scales`` and for symmetric weights."""
        if self.has_zero_points:
            return self.codes().dequantized()
        scales, offsets = self.decoded()
        at = self.group_of
        return self.q.to(scales.dtype) * scales[:, at] - offsets[:, at]

    @property
    def group_of(self) -> Tensor:
        """The group of every column, int64 (in,)."""
        return group_of(self.q.shape[1], len(self.scales.q), self.index, self.q.device)

    @property
    def has_zero_points(self) -> bool:
        """Whether the offsets are z·s for an integer z."""
        return self.offsets is None or self._is_symmetric()

    def codes(self) -> Codes:
        """The weight with decoded scales, as everything else takes it: it can be packed, written and simulated.

        Raises:
            ConfigError: no integer zero points stand for the offsets.
        """
        if not self.has_zero_points:
            raise ConfigError("the offsets are real numbers, not z·s: use form='scales', which keeps zero points")
        scales = self.decoded()[0].contiguous()
        middle = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scales.device)
        zeros = middle if self.zeros is None else self.zeros
        return Codes(self.q, scales, zeros, self.bits, torch.equal(zeros, middle), self.index)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names of the layout.

        ``qweight`` and ``qzeros`` are packed as in a GPTQ checkpoint of the format ``gptq``, which has z − 1 modulo
        2^bits with its ambiguous z = 0. ``g_idx`` is int32 (in,).
        """
        found = {"qweight": pack_words(self.q.T, self.bits, 0), "g_idx": self.group_of.to(torch.int32)}
        found |= {"qscales_scales": self.scales.scales, "qscales_zeros": self.scales.zeros}
        if self.offsets is not None:
            found["qstatistic"] = self.scales.q << 4 | self.offsets.q
            return found | {"qzeros_scales": self.offsets.scales, "qzeros_zeros": self.offsets.zeros}
        assert self.zeros is not None
        return found | {"qscales": self.scales.q, "qzeros": pack_words((self.zeros.int() - 1).T, self.bits, 1)}

    @property
    def nbytes(self) -> int:
        """The size of all that is stored, without ``g_idx`` where the groups lie side by side and none needs it."""
        return sum(t.nbytes for name, t in self.tensors().items() if name != "g_idx" or self.index is not None)

    def _is_symmetric(self) -> bool:
        offsets, scales = self.offsets, self.scales
        assert offsets is not None
        same = torch.equal(offsets.q, scales.q) and torch.equal(offsets.zeros, scales.zeros)
        return same and torch.equal(offsets.scales, scales.scales * 2 ** (self.bits - 1))


def double_quantize(
    codes: Codes,
    *,
    mode: int = 2,
    size: int | None = None,
    form: DoubleForm | None = None,
    matrix: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> DoubleQuantized:
    """Round the scales and offsets of a weight.

    A decoded scale is within (max − min)/30 of the given one in the form ``statistic`` and within (max − min)/510 in
    the form ``scales``, up to rounding in ``dtype``, with max and min over what shares statistics. So is an offset in
    the form ``statistic``.

    Args:
        codes: of the weight, all of one width.
        mode: 1 or 2, as in the module's table.
        size: how many outputs share statistics in mode 2. It must divide them. None takes all.
        form: None takes ``statistic`` for symmetric weights and ``scales`` for others.
        matrix: the float weight (out, in), to choose its codes anew as the nearest on the rounded grid.
        dtype: of the statistics.

    Raises:
        ConfigError: an unknown mode or form, or a size that does not divide the outputs.
    """
    chosen = form or ("statistic" if codes.symmetric else "scales")
    if chosen not in get_args(DoubleForm):
        raise ConfigError(f"form {chosen!r} is not 'statistic' or 'scales'")
    scales = round_statistics(codes.scales.T, mode, size, _BITS[chosen], dtype)
    offsets, zeros = None, codes.zeros
    if chosen == "statistic" and codes.symmetric:
        offsets = ScaleStatistics(scales.q, scales.scales * 2 ** (codes.bits - 1), scales.zeros)
    elif chosen == "statistic":
        products = codes.zeros.to(codes.scales.dtype) * codes.scales
        offsets = round_statistics(products.T, mode, size, _BITS[chosen], dtype)
    made = DoubleQuantized(codes.q, codes.bits, scales, offsets, None if offsets else zeros, codes.index)
    return made if matrix is None else _nearest(made, matrix)


def from_tensors(tensors: Mapping[str, Tensor], bits: int) -> DoubleQuantized:
    """The inverse of :meth:`DoubleQuantized.tensors`, bit for bit, for codes of ``bits``.

    Raises:
        ConfigError: a tensor is missing.
    """
    needed = {"qweight", "g_idx", "qscales_scales", "qscales_zeros"}
    form: DoubleForm = "statistic" if "qstatistic" in tensors else "scales"
    needed |= {"qstatistic", "qzeros_scales", "qzeros_zeros"} if form == "statistic" else {"qscales", "qzeros"}
    if missing := sorted(needed - set(tensors)):
        raise ConfigError(f"a double-quantized weight of the form {form!r} needs {', '.join(missing)} as well")
    index = tensors["g_idx"].long()
    columns, out = len(index), tensors["qweight"].shape[1]
    stored = tensors["qstatistic" if form == "statistic" else "qscales"]
    q = unpack_words(tensors["qweight"], bits, 0, columns).T.contiguous()
    of_scales = (tensors["qscales_scales"], tensors["qscales_zeros"])
    groups = len(stored)
    side_by_side = torch.equal(index, torch.arange(columns, device=index.device) // -(-columns // groups))
    kept = None if side_by_side else index
    if form == "statistic":
        offsets = ScaleStatistics(stored & 15, tensors["qzeros_scales"], tensors["qzeros_zeros"])
        return DoubleQuantized(q, bits, ScaleStatistics(stored >> 4, *of_scales), offsets, None, kept)
    zeros = (unpack_words(tensors["qzeros"], bits, 1, out).T.contiguous() + 1) & (2**bits - 1)
    return DoubleQuantized(q, bits, ScaleStatistics(stored, *of_scales), None, zeros, kept)


def round_statistics(values: Tensor, mode: int, size: int | None, bits: int, dtype: torch.dtype) -> ScaleStatistics:
    """Round values (groups, out) on a grid from the smallest to the largest that share statistics.

    Args:
        values: float, the scales or offsets of groups.
        mode: as for :func:`double_quantize`.
        size: likewise.
        bits: the width of the codes.
        dtype: of the statistics.

    Raises:
        ConfigError: an unknown mode, or a size that does not divide the outputs.
    """
    out = values.shape[1]
    if mode not in (1, 2):
        raise ConfigError(f"mode {mode} of double quantization is not 1 or 2")
    if mode == 1 and size not in (None, 1):
        raise ConfigError(f"size {size} in mode 1, whose statistics are those of one output: leave it out")
    if size is not None and (size < 1 or out % size):
        raise ConfigError(f"size {size} does not divide the {out} outputs")
    width = 1 if mode == 1 else size or out
    shaped = values.to(dtype).reshape(len(values), -1, width)
    dim = 0 if mode == 1 else 2
    low, high = shaped.amin(dim, keepdim=True), shaped.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.where(high != 0, high, 1).abs())  # all equal: one step above zero
    zeros = -low / step
    q = (shaped / step + zeros).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return ScaleStatistics(q, step, zeros)


def _nearest(weight: DoubleQuantized, matrix: Tensor) -> DoubleQuantized:
    """The same grid with the codes that are nearest to ``matrix`` (out, in)."""
    scales, offsets = weight.decoded()
    at = weight.group_of
    exact = (matrix.to(scales.dtype) + offsets[:, at]) / scales[:, at]
    q = exact.round().clamp(0, 2**weight.bits - 1).to(torch.uint8)
    return DoubleQuantized(q, weight.bits, weight.scales, weight.offsets, weight.zeros, weight.index)

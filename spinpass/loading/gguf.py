"""A GGUF file whose weights stay in it: their rows are dequantized when they are read, as transformers would.

What transformers makes of a file is its own business: which tensor is which parameter, and what its converter has done
to some of them. Both are asked of it, tensor by tensor. Where it only moves rows about, as it does with queries and
keys, a constant reads those rows from the file; where it computes, the tensor is held in memory as transformers makes
it. Architectures that transformers reads by other code than that, it loads.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.formats import GgufHeader
from spinpass.graph import Handle, Rows

from .declared import DeclaredBases
from .files import gguf_header
from .quantized import gguf_types
from .sources import Source
from .streamed import Streamed, keeps_floats, unwritten
from .tensors import LoadingReport, check_finite

_PIECE = 1 << 18  # elements that are dequantized at once
_SIDE_BY_SIDE = 3  # tensors, whose orders are all tried
_LEGACY = "transformers.modeling_gguf_pytorch_utils"


@dataclass(frozen=True, eq=False)
class GgufRows:
    """Rows of a tensor of a GGUF file; see :class:`spinpass.graph.ConstantSource`.

    Args:
        blocks: the mapped file, uint8, a row of bytes for each row of the tensor.
        kind: the type of the tensor, as the package gguf has it.
        shape: of the values.
        dtype: of what is read.
        order: which row of the file each row is, (rows,) int64; None where they are in order.
        bases: what the rows are in another basis by, as the file declares; None where they are in the model's.
    """

    blocks: Any
    kind: Any
    shape: torch.Size
    dtype: torch.dtype
    order: Tensor | None = None
    bases: DeclaredBases | None = None

    @property
    def device(self) -> torch.device:
        """It is the CPU."""
        return torch.device("cpu")

    @property
    def by_rows(self) -> bool:
        """They do."""
        return True

    def read(self, rows: Rows) -> Tensor:
        """Return the rows, dequantized in float32, in the basis of the model, cast to the dtype."""
        return self._made(rows, self.dtype)

    def exact(self, rows: Rows) -> Tensor:
        """Return the rows in float64, those in a basis of their own before they are rounded to the dtype."""
        return self.read(rows).double() if self.bases is None else self._made(rows, torch.float64)

    def _made(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the rows in a dtype, made a piece at a time: what dequantizes needs several times their memory."""
        from gguf import dequantize

        order = torch.arange(self.shape[0], device="cpu") if self.order is None else self.order
        places = order[rows]
        found = torch.empty((len(places), *self.shape[1:]), dtype=dtype, device="cpu")
        most = max(1, _PIECE // max(1, self.shape[1:].numel()))
        for first in range(0, len(places), most):
            piece = places[first : first + most]
            values = dequantize(self.blocks[piece.numpy()], self.kind)
            read = torch.from_numpy(values if values.flags.writeable else values.copy())
            found[first : first + most] = read if self.bases is None else self.bases.undone(read)
        return found


@dataclass(frozen=True, eq=False)
class GgufStack:
    """Tensors of a GGUF file side by side along their second axis, such as the gates and the inputs of all experts."""

    parts: tuple[GgufRows, ...]

    @property
    def shape(self) -> torch.Size:
        """That of all together."""
        first, _, *others = self.parts[0].shape
        return torch.Size((first, sum(part.shape[1] for part in self.parts), *others))

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """It is the CPU."""
        return self.parts[0].device

    @property
    def by_rows(self) -> bool:
        """They do."""
        return True

    def read(self, rows: Rows) -> Tensor:
        """Return these matrices of the stack."""
        return torch.cat([part.read(rows) for part in self.parts], 1)

    def exact(self, rows: Rows) -> Tensor:
        """Return these matrices in float64."""
        return torch.cat([part.exact(rows) for part in self.parts], 1)


def streamed_gguf(
    transformers: Any, source: Source, dtype: Any, bases: DeclaredBases | None
) -> tuple[Streamed, LoadingReport] | None:
    """Return a model to be traced in ``dtype`` whose weights are read from a GGUF file, and what loading it did.

    Rows that the file declares to be in ``bases`` of their own are put back.

    None: it is better loaded by transformers, which then says what is wrong with it, or reads it in another way.

    Raises ExportError: a value is not finite. Raises whatever transformers raises for a file that it does not know.
    """
    path = Path(source.location, str(source.gguf))
    config = transformers.AutoConfig.from_pretrained(source.location, gguf_file=source.gguf)
    legacy = importlib.import_module(_LEGACY)
    header = gguf_header(path)
    kind = str(header.values.get("general.architecture"))
    if not header.little_endian or _has_reader_of_its_own(kind):
        return None
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    traced = unwritten(transformers.AutoModelForCausalLM, config, dtype)
    if keeps_floats(traced, dtype):
        return None
    processor = legacy.TENSOR_PROCESSORS.get(kind, legacy.TensorProcessor)(config=_parsed(legacy, path))
    values, unused = _Tensors(legacy, processor, traced, dtype, bases).of(_mapped(path, header))
    places = traced.state_dict()
    if any(name not in places or places[name].shape != value.shape for name, value in values.items()):
        return None
    if _is_renamed(traced, values):
        return None
    made = Streamed.filling(traced, values)
    if made is None:
        return None
    check_finite(str(path), values.items())
    types = gguf_types(path)
    notes = () if bases is None else (f"{len(bases.names)} weights are put back from the Hadamard bases they declare",)
    return made, LoadingReport(unused, dequantized=f"GGUF {'/'.join(types)}" if types else None, notes=notes)


class _Mapped(NamedTuple):
    """A tensor of a file: its name, the bytes of each row, its type as the package gguf has it, its shape."""

    name: str
    data: Any
    kind: Any
    shape: torch.Size


class _Tensors:
    """Makes of every tensor in a file the parameter that transformers makes of it.

    Args:
        legacy: the module of transformers.
        processor: what undoes the changes of the file's converter for this architecture.
        model: it has the parameters.
        dtype: of the parameters.
        bases: those that the file declares.
    """

    def __init__(
        self, legacy: Any, processor: Any, model: Any, dtype: torch.dtype, bases: DeclaredBases | None
    ) -> None:
        self._bases = bases
        self._processor = processor
        self._dtype = dtype
        self._names: dict[str, str] = legacy.get_gguf_hf_weights_map(model, processor)

    def of(self, tensors: Sequence[_Mapped]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the values by the name of their parameter, and the names of tensors that belong to none."""
        found, stacked = self._stacks(tensors)
        merged: dict[str, dict[str, Tensor]] = {"tensors": {}}
        unused = []
        for tensor in tensors:
            name = tensor.name
            if name in stacked:
                continue
            if name not in self._names and name.rpartition(".")[0] not in self._names:  # experts are named without end
                unused.append(name)
                continue
            order = self._order(name, tensor.shape)
            own = self._bases if self._bases is not None and name in self._bases.names else None
            if order is None:
                if own is not None:
                    raise ExportError(f"{name} is in a basis that the file declares, and its rows are not the model's")
                found |= self._processed(tensor, merged)
            else:
                moved = None if torch.equal(order, torch.arange(len(order), device="cpu")) else order
                rows = GgufRows(tensor.data, tensor.kind, tensor.shape, self._dtype, moved, own)
                found[self._names[name]] = Handle(rows)
        return found | {name: value.to(self._dtype) for name, value in merged["tensors"].items()}, tuple(unused)

    def _stacks(self, tensors: Sequence[_Mapped]) -> tuple[dict[str, Tensor], set[str]]:
        """Return the parameters that are stacks of matrices put side by side, and the names of their tensors."""
        groups: dict[str, list[_Mapped]] = {}
        for tensor in tensors:
            parameter = self._names.get(tensor.name.rpartition(".")[0])
            if len(tensor.shape) == 3 and tensor.name not in self._names and parameter is not None:
                groups.setdefault(parameter, []).append(tensor)
        found: dict[str, Tensor] = {}
        names: set[str] = set()
        for parameter, group in groups.items():
            parts = self._side_by_side(parameter, group)
            if parts is not None:
                rows = [GgufRows(t.data, t.kind, t.shape, self._dtype) for t in parts]
                found[parameter] = Handle(rows[0] if len(rows) == 1 else GgufStack(tuple(rows)))
                names |= {tensor.name for tensor in group}
        return found, names

    def _side_by_side(self, parameter: str, group: Sequence[_Mapped]) -> Sequence[_Mapped] | None:
        """Return the tensors of a parameter in the order in which transformers puts them side by side; None where it
        does something else. It is shown drawn numbers in place of rows, and has to leave them as they are."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = [torch.randint(1 << 62, (*tensor.shape[:2], 1), generator=generator, device="cpu") for tensor in group]
        merged: dict[str, dict[str, Tensor]] = {"tensors": {}}
        try:
            for tensor, numbers in zip(group, drawn, strict=True):
                self._processor.process(
                    weights=numbers.numpy(), name=tensor.name, tensor_key_mapping=self._names, parsed_parameters=merged
                )
        except (TypeError, ValueError, KeyError, RuntimeError):
            return None
        made = merged["tensors"].get(parameter)
        if made is None or len(group) > _SIDE_BY_SIDE:
            return None
        for places in itertools.permutations(range(len(group))):
            if torch.equal(made, torch.cat([drawn[place] for place in places], 1)):
                return [group[place] for place in places]
        return None

    def _order(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return which row of the file each row of the parameter is; None where there is more to it than rows.

        The rows are numbered in records, which can be moved, and not be computed with.
        """
        import numpy

        if name not in self._names or len(shape) != 2:
            return None
        numbered = numpy.arange(shape[0]).view([("row", numpy.int64)]).reshape(-1, 1)
        try:
            made = self._processor.process(
                weights=numbered, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
            )
        except (TypeError, ValueError, KeyError):
            return None
        if made.name != name or made.weights.shape != numbered.shape:
            return None
        order = torch.from_numpy(numpy.ascontiguousarray(made.weights["row"]).reshape(-1))
        return order if torch.equal(order.sort().values, torch.arange(shape[0], device="cpu")) else None

    def _processed(self, tensor: _Mapped, merged: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a parameter by its name, as transformers makes it of a tensor; what it makes of several tensors, it
        puts into ``merged``."""
        import numpy
        from gguf import dequantize

        made = self._processor.process(
            weights=dequantize(tensor.data, tensor.kind),
            name=tensor.name,
            tensor_key_mapping=self._names,
            parsed_parameters=merged,
        )
        if made.name not in self._names:
            return {}
        return {self._names[made.name]: torch.from_numpy(numpy.copy(made.weights)).to(self._dtype)}


def _mapped(path: Path, header: GgufHeader) -> list[_Mapped]:
    import numpy
    from gguf import GGMLQuantizationType

    held = numpy.memmap(path, mode="r")
    return [
        _Mapped(
            name,
            held[tensor.first : tensor.first + tensor.bytes].reshape(*tensor.shape[:-1], -1),
            GGMLQuantizationType(tensor.kind),
            torch.Size(tensor.shape),
        )
        for name, tensor in header.tensors.items()
    ]


def _parsed(legacy: Any, path: Path) -> Any:
    return legacy.load_gguf_checkpoint(str(path), return_tensors=False)["config"]


def _has_reader_of_its_own(kind: str) -> bool:
    """Say whether transformers reads an architecture by the code that keeps blocks, which dequantizes otherwise."""
    try:
        theirs = importlib.import_module("transformers.integrations.gguf.utils")
    except ImportError:
        return False
    return bool(theirs.is_gguf_arch_supported(kind))


def _is_renamed(model: Any, values: Mapping[str, Tensor]) -> bool:
    """Say whether transformers would still convert some of the parameters while it loads them."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    return any(loading.rename_source_key(name, renamings, converters) != (name, None) for name in values)

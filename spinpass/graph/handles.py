"""Constants that are read when something is computed of them, and let go of afterwards.

    handle  =  shape, dtype, device, read(rows)          a program's state dict may hold one in place of a tensor

torch's operators take a handle for the tensor that it stands for: they read it, and what they return is an ordinary
tensor. A lookup reads the rows that are looked up, and a product with a large matrix is computed a block of rows at a
time, so that no table has to stand in memory. An operator that writes into a handle is refused; what it returns may be
a view of a file, and is not to be written to either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from spinpass.errors import ProgramError

from .folding import QueuedStep
from .signature import with_other_values
from .sources import EVERY_ROW, LARGE, ConstantSource, FoldedSource, Held, Rows, Spooled, Wide, moved, row_blocks


class Handle(Tensor):
    """A constant that is read where it is used; see this module.

    Args:
        source: what is read.
        turned: stand for the transpose of the source, which is a matrix.
    """

    source: ConstantSource
    turned: bool

    @staticmethod
    def __new__(cls, source: ConstantSource, turned: bool = False) -> Handle:
        """Make a tensor without memory."""
        shape = tuple(reversed(source.shape)) if turned else source.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)

    def __init__(self, source: ConstantSource, turned: bool = False) -> None:
        super().__init__()
        self.source = source
        self.turned = turned

    def read(self, rows: Rows = EVERY_ROW) -> Tensor:
        """Return the values, or these rows of the source."""
        found = self.source.read(rows)
        return found.t() if self.turned else found

    def folded(self, steps: Sequence[QueuedStep]) -> Handle:
        """Return a handle of what steps make of the values, each time they are read."""
        if not steps:
            return self
        if self.turned:
            raise ProgramError("a transposed constant has no steps of its own: its source has")
        return Handle(FoldedSource(self.source, tuple(steps)))

    def lifted(self, *, unrounded: bool = False) -> Tensor:
        """Return the float64 values, on demand as they were before they were rounded; a handle where they are many.

        What is not floating point is returned as it is.
        """
        if not self.dtype.is_floating_point:
            return self.read()
        wide = Handle(Wide(self.source, unrounded), self.turned)
        return wide if wide.is_large else wide.read()

    @property
    def is_large(self) -> bool:
        """Whether it is better read in parts, where it can be."""
        return self.nbytes > LARGE

    @property
    def in_parts(self) -> bool:
        """Whether it is large, and rows of it cost less than the whole."""
        return self.is_large and self.source.by_rows and not self.turned

    def blocks(self) -> Iterator[Tensor]:
        """Yield the values in order, a block of rows at a time; a transpose as a whole."""
        if self.turned:
            yield self.read()
            return
        for rows in row_blocks(self.source):
            yield self.source.read(rows)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array; see :meth:`torch.Tensor.numpy`."""
        return self.read().numpy(force=force)

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what is read."""
        return f"Handle({type(self.source).__name__}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a handle of the same values."""
        made = Handle(self.source, self.turned)
        return torch.nn.Parameter(made, requires_grad=False) if isinstance(self, torch.nn.Parameter) else made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise ProgramError: what is read elsewhere cannot be stored."""
        raise ProgramError("a constant that is read when it is used cannot be stored: call spinpass.materialize first")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; a product with rows that do not lie side by side would else be one of a matrix for
        each sequence."""
        if func in _LINEAR and isinstance(args[0], Tensor):
            args = (args[0].contiguous(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call an operator on what the handles stand for."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Handle):
            if func in _SAME:
                return Handle(first.source, first.turned)
            if func is torch.ops.aten.t.default and first.ndim == 2:
                return Handle(first.source, not first.turned)
            if func in _LOOKUPS and not first.turned and len(args) > 1:
                found = _looked_up(func, first, args)
                if found is not None:
                    return found
        last = args[-1] if args else None
        if func in _PRODUCTS and isinstance(last, Handle) and last.turned and last.is_large and not kwargs:
            return _by_blocks(func, args[:-1], last)
        if func._schema.is_mutable:
            pairs = zip((*args, *kwargs.values()), func._schema.arguments, strict=False)
            if isinstance(kwargs.get("out"), Handle) or any(
                isinstance(v, Handle) and a.alias_info and a.alias_info.is_write for v, a in pairs
            ):
                raise ProgramError(
                    f"{func} writes into a constant that is read when it is used: call spinpass.materialize first"
                )
        values = Handle.read if func in _PRODUCTS else _values
        args, kwargs = tree_map_only(Handle, values, args), tree_map_only(Handle, values, kwargs)
        return func(*args, **kwargs)


def _values(handle: Handle) -> Tensor:
    return handle.read().contiguous()  # as its strides say


def linear_together(each: Sequence[tuple[Tensor, Tensor | None]], weight: Handle) -> list[Tensor]:
    """Return ``x Wᵀ + b`` for several x and b, with each block of the rows of W read once for all.

    Args:
        each: the inputs (..., in), in the dtype of the weight, each with its bias (out,), (1,) or none.
        weight: (out, in), which is not turned.
    """
    flat = [x.reshape(-1, x.shape[-1]) for x, _ in each]
    made = [torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device) for x in flat]
    for rows in row_blocks(weight.source):
        block = weight.read(rows).t()
        for x, (_, bias), y in zip(flat, each, made, strict=True):
            y[:, rows] = x @ block if bias is None else torch.addmm(_part(bias, rows), x, block)
    return [y.view(*x.shape[:-1], weight.shape[0]) for (x, _), y in zip(each, made, strict=True)]


def _by_blocks(func: Any, operands: tuple[Any, ...], matrix: Handle) -> Tensor:
    """Return a product with the transpose of a large source, a block of its rows at a time."""
    x = operands[-1]
    made = torch.empty(x.shape[0], matrix.shape[1], dtype=x.dtype, device=x.device)
    for rows in row_blocks(matrix.source):
        made[:, rows] = func(*_cut(operands, rows), matrix.read(rows))
    return made


def _cut(operands: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    """Return the operands before a matrix, of which a bias is cut as the matrix is."""
    *bias, x = operands
    return (*(_part(b, rows) for b in bias), x)


def _part(bias: Tensor, rows: slice) -> Tensor:
    return bias[..., rows] if bias.ndim and bias.shape[-1] > 1 else bias


def _looked_up(func: Any, table: Handle, args: tuple[Any, ...]) -> Tensor | None:
    """Return what a lookup finds, reading the rows that it names."""
    if func is torch.ops.aten.embedding.default:
        ids = args[1]
    elif args[1] == 0 and isinstance(args[2], Tensor):
        ids = args[2].reshape(-1)
    else:
        return None
    if not isinstance(ids, Tensor) or isinstance(ids, Handle):
        return None
    names, places = torch.unique(ids, return_inverse=True)
    if names.numel() and (int(names[0]) < 0 or int(names[-1]) >= table.shape[0]):
        raise IndexError(f"index out of range in a table of {table.shape[0]} rows")
    return table.read(names)[places]


_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_LOOKUPS = {torch.ops.aten.embedding.default, torch.ops.aten.index_select.default}
_LINEAR = {torch.nn.functional.linear, torch.ops.aten.linear.default}
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def values_of(tensor: Tensor) -> Tensor:
    """Return the values of a constant: those that a handle stands for, or the tensor itself."""
    held = tensor.detach()
    return held.read() if isinstance(held, Handle) else held


def fake_parameter(tensor: Tensor) -> Tensor:
    """Return the fake value of a parameter that holds a tensor or handle. A mode of fake tensors is on."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return torch.nn.Parameter(empty, requires_grad=False)


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two constants have in common if and only if they are the same values in the same memory."""
    held = tensor.detach()
    if isinstance(held, Handle):
        return id(held.source), held.turned
    if isinstance(held, torch._subclasses.FakeTensor) or held.numel() == 0:
        return (id(tensor),)
    return held.data_ptr(), tuple(held.shape), held.stride(), held.dtype, held.device


def spooled(program: ExportedProgram, folder: Path, most: int) -> ExportedProgram:
    """Return the program with every handle's values kept in files of ``folder`` once they have been read.

    At most so many bytes are kept; handles beyond them are read as before. Constants that are tied stay tied, and each
    is on the device that it was on.
    """
    made: dict[tuple[Any, ...], Handle] = {}
    for tensor in program.state_dict.values():
        if isinstance(tensor, Handle) and storage_key(tensor) not in made:
            source = moved(tensor.source, torch.device("cpu"))
            if isinstance(source, (Held, Spooled)) or tensor.nbytes > most:
                continue
            most -= tensor.nbytes
            made[storage_key(tensor)] = Handle(moved(Spooled(source, folder), tensor.device), tensor.turned)
    values = {name: made.get(storage_key(tensor)) for name, tensor in program.state_dict.items()}
    return with_other_values(program, {name: value for name, value in values.items() if value is not None})


def materialize(program: ExportedProgram) -> ExportedProgram:
    """Return the program with ordinary tensors in place of constants that are read when they are used.

    Constants that are tied stay tied. A program without any is returned as it is.
    """
    lazy = {name: tensor for name, tensor in program.state_dict.items() if isinstance(tensor, Handle)}
    if not lazy:
        return program
    held = {storage_key(tensor): tensor for tensor in lazy.values()}
    made = {key: values_of(tensor).contiguous() for key, tensor in held.items()}
    return with_other_values(program, {name: made[storage_key(tensor)] for name, tensor in lazy.items()})

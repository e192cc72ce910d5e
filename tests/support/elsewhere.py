"""A device that is none: tensors on ``elsewhere:0`` lie in the CPU's memory, and no operator meets them and others.

It fails where CUDA would: an operator that is given tensors of two devices (numbers, tensors of rank 0, of the CPU
excepted), one that draws on one device from the generator of another, and a tensor that is asked for its memory. Values
are computed by the CPU. What is registered with torch stays for the life of the process, so tests run it in one
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.backend_registration as backends
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "elsewhere"
CPU = torch.device("cpu")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class MixedDevices(RuntimeError):
    """An operator has met two devices."""


class There(Tensor):
    """A tensor on the device, whose values ``held`` has."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise MixedDevices("numpy() of a tensor elsewhere: move it to the CPU first")
        return self.held.numpy()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = There(self.held.clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _called(func, types, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, types, args, kwargs or {})


class _Function(TorchFunctionMode):
    """``torch.tensor`` moves what it makes beneath every mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(given.get("device") or CPU).type == NAME:
            device = given.pop("device")
            return func(*args, **given).to(device)
        return func(*args, **given)


def _called(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after a look at the devices."""
    if FakeTensor in types or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return func(*args, **kwargs)  # fake tensors have a look of their own
    if any(each not in (There, Tensor, torch.nn.Parameter) for each in types):
        return NotImplemented  # handles see to it themselves
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in given if isinstance(leaf, There)]
    here = [leaf for leaf in given if not isinstance(leaf, There) and leaf.ndim]
    if there and here and func not in _MOVES:
        shapes = [(leaf.device.type, tuple(leaf.shape)) for leaf in given]
        raise MixedDevices(f"{func} meets two devices: {shapes}")
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else (there[0].device if there else CPU)
    if func is torch.ops.aten.copy_.default:
        target = args[0].device
    if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))) and target.type == NAME:
        raise MixedDevices(f"{func} draws elsewhere from a generator of the CPU")
    if func.namespace == "spinpass":
        with elsewhere():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    plain_args, plain = tree_map_only(There, lambda leaf: leaf.held, (args, kwargs))
    if asked is not None:
        plain["device"] = CPU
    found = func(*plain_args, **plain)
    written = [
        value
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written and isinstance(found, Tensor):
        return written[0]
    return tree_map_only(Tensor, There, found) if target.type == NAME else found


class _Module(backends._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, which is there for as long as this lasts."""
    with _Function(), _Dispatch():
        yield torch.device(NAME, 0)


def register() -> None:
    """Make the device known to torch, for the rest of the process."""
    backends._setup_privateuseone_for_python_backend(NAME, _Module())

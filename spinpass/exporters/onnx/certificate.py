"""The certificate continued onto the ONNX file: ONNX Runtime's outputs against the program's, for the same inputs.

A fused decoder is compared on three kinds of call, because GroupQueryAttention takes another path for each: a prompt on
an empty cache, a single token, and several tokens on a cache, which the kernel takes for one sequence only. All three
are cut out of one set of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import execution
from spinpass.certificate import FileCertificate, FileComparison, of_draws
from spinpass.execution import InputRole, Sizes, UserInput
from spinpass.runtime import FileSession

KIND = "ONNX file"
_CACHE_RANK = 4
_MASK_RANK = 2


def certify_onnx(
    ep: ExportedProgram, path: Path, inputs: object = None, *, fused: bool = False, prepack: bool = True
) -> FileCertificate:
    """Run the file at ``path`` (CPU, default optimisations) and ``ep`` on ``inputs`` and compare.

    ``inputs`` are what :func:`spinpass.execution.flat_inputs` takes; None draws several from the program's own specs.
    Inputs and outputs of the file are matched to the program's by position. A ``fused`` file is compared on several
    parts of them, which :func:`fused_cases` cuts. Of each output the worst is kept. ``prepack`` is that of
    :func:`spinpass.runtime.open_session`.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    cases = partial(fused_cases, ep) if fused else lambda values: [values]
    with FileSession(path) as session:
        taken, returned = session.open(prepack=prepack)
        names = [name for name, _ in taken]
        drawn = FileComparison.drawn(ep, inputs, cases, _one_size(ep, [shape for _, shape in taken]))
        return of_draws(
            [
                [compared.certificate(names, returned, session.run(compared.fed), KIND) for compared in cases]
                for cases in drawn
            ]
        )


def fused_cases(ep: ExportedProgram, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut ``values`` to a prompt without cache, to one token per sequence, and to one sequence.

    They stay whole, one case, where the program has no cache whose length is a size of its own. In a mask that is all
    open the second key of the first row is closed.
    """
    specs = execution.user_inputs(ep)
    sizes = execution.bound_sizes(specs, values)
    caches = [s for s in specs if len(s.shape) == _CACHE_RANK and _is_symbol(s.shape[2])]
    ids = next((s for s in specs if len(s.shape) == 2 and _is_symbol(s.shape[1])), None)
    if not caches or ids is None:
        return [dict(values)]
    empty = {spec.shape[2]: 0 for spec in caches}
    one_token = {ids.shape[1]: 1}
    one_row = {ids.shape[0]: 1} if _is_symbol(ids.shape[0]) else {}
    return [_cut(specs, values, sizes | change) for change in (empty, one_token, one_row)]


def _holed(mask: Tensor) -> Tensor:
    """Return a mask of rows of keys that are not all open."""
    mask = mask.clone()
    if bool(mask.all()):
        mask[:1, 1:2] = 0
    return mask


def _cut(specs: list[UserInput], values: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Keep the first entries along every axis; numbers stay."""
    cut = dict(values)
    for spec in specs:
        value = values[spec.name]
        if isinstance(value, Tensor):
            for axis, size in enumerate(spec.shape):
                value = value.narrow(axis, 0, execution.concrete(size, sizes))
            is_mask = spec.role is InputRole.MASK and value.ndim == _MASK_RANK
            cut[spec.name] = _holed(value) if is_mask else value
    return cut


def _one_size(ep: ExportedProgram, shapes: Sequence[Sequence[int | str]]) -> list[set[Any]]:
    """Return the symbols of the program that the file gives one name, which promises that they are one size."""
    found: dict[str, set[Any]] = {}
    taken = [spec for spec in execution.user_inputs(ep) if spec.name not in execution.specialised(ep)]
    for spec, shape in zip(taken, shapes, strict=True):
        for size, name in zip(spec.shape, shape, strict=False):
            if isinstance(name, str) and _is_symbol(size):
                found.setdefault(name, set()).add(size)
    return [symbols for symbols in found.values() if len(symbols) > 1]


def _is_symbol(size: Any) -> bool:
    return bool(getattr(size, "is_symbol", False))

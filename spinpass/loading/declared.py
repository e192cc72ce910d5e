"""Hadamard bases that a GGUF file declares for its weights (keys ``prism.hadamard.*``, version 1), and their undoing.

A declared weight was written in another basis of its input: the runtime makes x' = H (s · x) of what it multiplies,
with the normalized Sylvester-Hadamard matrix H in blocks and signs s by the width of x, so that W' x' = W x. An
embedding that is declared ``inverse`` is looked up as z and put back as s · (H z). Either way a row w' of the file
stands for the row s · (H w') of the model. Who ignores the declaration computes something else, without any error.

Source: pull requests 120 and 121 of PrismML's fork of the runtime of such files, whose loader validates the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.rotations import Rotation

from .files import gguf_header
from .tensors import listed

_PREFIX = "prism.hadamard."
_FIXED = {"version": 1, "transform": "normalized-sylvester-walsh-hadamard", "axis": "input-last-dimension"}
_KNOWN = {*_FIXED, "block_size", "sign_mode", "sign_widths", "sign_values", "weight_names", "inverse_weight_names"}
_GROUPED = "gdn_v_grouped"  # says that the inputs of some weights stand in another order as well


@dataclass(frozen=True)
class DeclaredBases:
    """The weights of a file that are in a basis of their own, by name, and that basis by the width of their rows."""

    names: frozenset[str]
    block: int
    signs: Mapping[int, Tensor]

    def undone(self, rows: Tensor) -> Tensor:
        """Return rows (…, width) in float64 in the basis of the model."""
        width = rows.shape[-1]
        rotation = Rotation("hadamard", width, self.block)
        found = rotation.apply(rows.double(), dim=-1, inverse=True)
        return found * self.signs[width] if self.signs else found


def declared_bases(path: Path) -> DeclaredBases | None:
    """Return the bases that a GGUF file declares; None where it declares none.

    Raises ExportError: it declares what cannot be undone, is not known here, or contradicts itself or its tensors.
    """
    header = gguf_header(path)
    if not any(key.startswith(_PREFIX) for key in header.values):
        return None
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    said = {key.removeprefix(_PREFIX): field.contents() for key, field in fields.items() if key.startswith(_PREFIX)}
    for key in sorted(said.keys() - _KNOWN - {_GROUPED}):
        raise _refusal(path, f"says {_PREFIX}{key}, which is not known here")
    for key, value in _FIXED.items():
        if said.get(key) != value:
            raise _refusal(path, f"says {_PREFIX}{key} = {said.get(key)!r}, and {value!r} is known here")
    if said.get(_GROUPED):
        raise _refusal(path, f"says {_PREFIX}{_GROUPED}, for which inputs would have to be put in another order")
    listed_names = [*said.get("weight_names", ()), *said.get("inverse_weight_names", ())]
    widths = {name: tensor.shape[1] for name, tensor in header.tensors.items() if len(tensor.shape) == 2}
    missing = [name for name in listed_names if name not in widths]
    if missing or not listed_names or len(set(listed_names)) != len(listed_names):
        raise _refusal(path, f"has no such matrices or names them twice: {listed(missing or listed_names)}")
    block = said.get("block_size")
    if not isinstance(block, int) or block < 2 or block & (block - 1):
        raise _refusal(path, f"says {_PREFIX}block_size = {block!r}, no power of two")
    uneven = [name for name in listed_names if widths[name] % block]
    if uneven:
        raise _refusal(path, f"has rows that do not consist of blocks of {block}: {listed(uneven)}")
    signs = _signs(path, said)
    unsigned = [name for name in listed_names if signs and widths[name] not in signs]
    if unsigned:
        raise _refusal(path, f"has no signs for rows as long as those of {listed(unsigned)}")
    return DeclaredBases(frozenset(listed_names), block, signs)


def _signs(path: Path, said: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return the signs by width, float64; none where the mode is that there are none."""
    mode = said.get("sign_mode", "identity")
    widths, values = said.get("sign_widths", []), said.get("sign_values", [])
    if mode == "identity" and not widths and not values:
        return {}
    right = mode == "explicit" and len(set(widths)) == len(widths) > 0 and sum(widths) == len(values)
    if not right or not all(value in (-1, 1) for value in values):
        raise _refusal(path, f"says {_PREFIX}sign_mode = {mode!r} with {len(values)} signs for the widths {widths}")
    found = torch.split(torch.tensor(values, dtype=torch.float64, device="cpu"), list(widths))
    return dict(zip(widths, found, strict=True))


def _refusal(path: Path, why: str) -> ExportError:
    return ExportError(
        f"{path} declares Hadamard bases of its weights and {why}; without undoing them it is another model: export "
        "the model as it was before"
    )

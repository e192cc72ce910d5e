"""balanced_bases:  a rotated program, inputs  ->  the bases in which caches round best, in closed form.

    (k A)(q A⁻ᵀ)ᵀ = k qᵀ;    min over A  tr(Aᵀ K A) · tr(A⁻¹ Q A⁻ᵀ)  =  (tr (K^½ Q K^½)^½)²,   K = Σ kᵀk,  Q = Σ qᵀq

A key that is rounded is off by δ, with E δδᵀ = c |k A|² I for steps in proportion to its size. So a score is off by
δ (q A⁻ᵀ)ᵀ, whose mean square is c times that product. With K = L Lᵀ and Lᵀ Q L = U Λ Uᵀ the minimum is at
A = L⁻ᵀ U Λ^¼, where both moments are Λ^½: directions that queries look at get finer steps. An orthogonal matrix behind
A changes neither trace, and a Hadamard levels the coordinates. A = I is the Hadamard alone, so the product is never
above that one's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.execution import execute, flat_inputs
from spinpass.graph import ProgramEditor, op_name
from spinpass.passes import stored_factors
from spinpass.progress import Progress
from spinpass.rotations import Rotation

from .changes import LearningPlace

_DENSE = 256  # coordinates, above which a matrix without structure costs more than it saves
FLOOR = 1e-3  # of the mean moment, added to each: what the inputs do not show may come


def balancing_begins(place: LearningPlace) -> Rotation | None:
    """Return one dense factor in place of a space's rotation; None where the space is not balanced.

    Balanced are spaces whose two sides run in the graph, as queries and keys behind RoPE do.
    """
    rotation = place.rotation
    if place.group != "invertible" or rotation is None or rotation.is_offline or rotation.size > _DENSE:
        return None
    return Rotation.from_factors([rotation.matrix()], place.name) if rotation.kind == "hadamard" else None


def balanced_bases(
    program: ExportedProgram,
    begun: Mapping[str, Rotation],
    inputs: Sequence[object],
    progress: Progress | None = None,
) -> dict[str, Rotation]:
    """Return the balanced basis of each space.

    Args:
        program: rotated by ``begun``. It is not changed.
        begun: what :func:`balancing_begins` returned, by the names of spaces.
        inputs: of the program, whose second moments count.
        progress: told the inputs that were run.

    A space whose values on one side are all zero, or no numbers, or that has one side only, is left out.
    """
    editor = ProgramEditor(program)
    sides = _sides(editor, begun)
    moments: dict[tuple[str, bool], Tensor] = {}

    def watch(node: Node, value: Any) -> Any:
        for space, dual in sides.get(node.name, ()):
            rows = value.detach().reshape(-1, value.shape[-1]).double()
            moments[space, dual] = moments.get((space, dual), 0) + rows.t() @ rows
        return value

    with torch.no_grad():
        for done, each in enumerate(inputs):
            execute(program, flat_inputs(program, each), watch=watch)
            if progress is not None:
                progress(done + 1, len(inputs))
    found: dict[str, Rotation] = {}
    for space, start in begun.items():
        keys, queries = moments.get((space, False)), moments.get((space, True))
        if keys is not None and queries is not None and all(has_values(each) for each in (keys, queries)):
            found[space] = Rotation.from_factors([balanced(keys.cpu(), queries.cpu()) @ start.matrix()], space)
    return found


def balanced(keys: Tensor, queries: Tensor) -> Tensor:
    """Return A, float64 (n, n), of second moments (n, n) of the two sides: it keeps the size of the keys.

    Both moments become one diagonal matrix, up to a factor.
    """
    keys, queries = (_raised(each) for each in (keys, queries))
    lower = torch.linalg.cholesky(keys)
    values, vectors = torch.linalg.eigh(lower.t() @ queries @ lower)
    found: Tensor = torch.linalg.solve_triangular(lower.t(), vectors, upper=True)
    found = found * values.clamp_min(0) ** 0.25
    return found * math.sqrt(float(keys.trace() / (found.t() @ keys @ found).trace()))


def _raised(moment: Tensor) -> Tensor:
    eye = torch.eye(len(moment), dtype=torch.float64, device="cpu")
    return moment + FLOOR * float(moment.trace()) / len(moment) * eye


def has_values(moment: Tensor) -> bool:
    """Whether a second moment, or the diagonal of one, is all numbers and not all zero."""
    return bool(moment.isfinite().all()) and bool(moment.any())


def _sides(editor: ProgramEditor, begun: Mapping[str, Rotation]) -> dict[str, list[tuple[str, bool]]]:
    """Return the values that the products of spaces turn, by the names of their nodes: each with the space, and whether
    it is the side that takes the dual."""
    found: dict[str, list[tuple[str, bool]]] = {}
    stored = {space: stored_factors(editor, start, space) for space, start in begun.items()}
    for node in editor.nodes:
        space = node.meta.get("custom", {}).get("spinpass_origin")
        if op_name(node) != "aten::matmul" or space not in stored:
            continue
        value, factor = node.all_input_nodes
        if editor.is_stored(factor) and editor.fqn(factor) in stored[space]:
            found.setdefault(value.name, []).append((space, stored[space][editor.fqn(factor)][1]))
    return found

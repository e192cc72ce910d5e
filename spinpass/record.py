"""What a rotated program says about itself: the basis of its KV cache, the rotations, the configuration.

The record travels as ``node.meta["custom"]["spinpass"]`` of the nodes that produce outputs. There it survives
``torch.export.save`` and ``load``, ``run_decompositions`` and ``copy.deepcopy``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from spinpass.errors import ProgramError
from spinpass.rotations import Rotation

RECORD_KEY = "spinpass"
"""The key of the record in ``node.meta["custom"]``."""


@dataclass(frozen=True)
class Carried:
    """A cache input or output that is in a rotated basis, ``x' = x R``.

    Attributes:
        rotation: R.
        dim: the axis that holds blocks of ``rotation.size`` elements, counted from the end, so that it is negative.
        space: the name of the space that the cache belongs to.
        heads: the axis that a vector's parts lie along, in front of ``dim``, where each of them has a matrix of its
            own; likewise negative. None where vectors lie on ``dim`` alone.
    """

    rotation: Rotation
    dim: int
    space: str
    heads: int | None = None

    def applied(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Return x R in float64, with ``inverse`` x R⁻¹, for a value of the cache, of any floating dtype."""
        wide = x.detach().to(torch.float64)
        if self.heads is None:
            last = wide.movedim(self.dim, -1)
        else:
            last = wide.movedim((self.heads, self.dim), (-2, -1)).flatten(-2)
        blocks = last.reshape(*last.shape[:-1], -1, self.rotation.size)
        made = self.rotation.apply(blocks, inverse=inverse).flatten(-2)
        if self.heads is None:
            return made.movedim(-1, self.dim)
        return torch.unflatten(made, -1, (-1, x.shape[self.dim])).movedim((-2, -1), (self.heads, self.dim))

    def to_dict(self) -> dict[str, Any]:
        """Return what :meth:`from_dict` reads, as values that JSON can hold."""
        told = {"rotation": self.rotation.to_dict(), "dim": self.dim, "space": self.space}
        return told if self.heads is None else told | {"heads": self.heads}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Carried:
        """Return the value that :meth:`to_dict` has written."""
        return Carried(Rotation.from_dict(data["rotation"]), data["dim"], data["space"], data.get("heads"))


@dataclass(frozen=True)
class Record:
    """What a rotated program says about itself.

    Attributes:
        version: the version of spinpass that rotated it last.
        inputs: its caches in a rotated basis, by placeholder name.
        outputs: the caches that it returns in a rotated basis, by index among the user outputs.
        config: the last configuration, as :meth:`spinpass.config.RotationConfig.to_dict` writes it.
        rotations: the fingerprint of every rotation, by the name of its space.
        certificate: what :meth:`spinpass.Certificate.to_dict` writes; None where the program was not certified.
    """

    version: str
    inputs: dict[str, Carried] = field(default_factory=dict)
    outputs: dict[int, Carried] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rotations: dict[str, str] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what :meth:`from_dict` reads, as values that JSON can hold."""
        return {
            "version": self.version,
            "inputs": {k: v.to_dict() for k, v in self.inputs.items()},
            "outputs": {str(k): v.to_dict() for k, v in self.outputs.items()},
            "config": self.config,
            "rotations": self.rotations,
            "certificate": self.certificate,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """Return the value that :meth:`to_dict` has written."""
        return Record(
            data["version"],
            {k: Carried.from_dict(v) for k, v in data["inputs"].items()},
            {int(k): Carried.from_dict(v) for k, v in data["outputs"].items()},
            data["config"],
            data["rotations"],
            data.get("certificate"),
        )


def read(program: ExportedProgram) -> Record | None:
    """Return the record of a rotated program, and None for any other program.

    Raises ProgramError where it is no record as spinpass writes it.
    """
    for node in program.graph.nodes:
        custom = node.meta.get("custom")
        if isinstance(custom, dict) and RECORD_KEY in custom:
            try:
                return Record.from_dict(custom[RECORD_KEY])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ProgramError(
                    f"the program's record of its rotations cannot be read ({error!r}): rotate the original again"
                ) from error
    return None


def write(graph: Graph, record: Record) -> None:
    """Attach the record to every operator whose result leaves the program, in place of an earlier one."""
    output = next(iter(reversed(graph.nodes)))
    data = record.to_dict()
    for node in output.all_input_nodes:
        if isinstance(node, Node) and node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), RECORD_KEY: data}

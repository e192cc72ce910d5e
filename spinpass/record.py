"""What a rotated program says about itself: the basis of its KV cache, the rotations, the configuration.

The record travels as ``node.meta["custom"]["spinpass"]`` of the nodes that produce outputs: it survives
``torch.export.save``/``load``, ``run_decompositions`` and ``copy.deepcopy``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from spinpass.rotations import Rotation

KEY = "spinpass"


@dataclass(frozen=True)
class Carried:
    """A cache input or output whose axis ``dim`` (negative) holds blocks of ``rotation.size`` in the basis ``x' = x
    R``.
    """

    rotation: Rotation
    dim: int
    space: str

    def to_dict(self) -> dict[str, Any]:
        return {"rotation": self.rotation.to_dict(), "dim": self.dim, "space": self.space}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Carried:
        return Carried(Rotation.from_dict(data["rotation"]), data["dim"], data["space"])


@dataclass(frozen=True)
class Record:
    """``inputs`` by placeholder name, ``outputs`` by index among the user outputs."""

    version: str
    inputs: dict[str, Carried] = field(default_factory=dict)
    outputs: dict[int, Carried] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rotations: dict[str, str] = field(default_factory=dict)  # space name -> fingerprint
    certificate: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
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
        return Record(
            data["version"],
            {k: Carried.from_dict(v) for k, v in data["inputs"].items()},
            {int(k): Carried.from_dict(v) for k, v in data["outputs"].items()},
            data["config"],
            data["rotations"],
            data.get("certificate"),
        )


def read(program: ExportedProgram) -> Record | None:
    """The record of a rotated program; None for any other program."""
    for node in program.graph.nodes:
        custom = node.meta.get("custom")
        if isinstance(custom, dict) and KEY in custom:
            return Record.from_dict(custom[KEY])
    return None


def write(graph: Graph, record: Record) -> None:
    """Attach the record to every operator whose result leaves the program, in place of an earlier one."""
    output = next(iter(reversed(graph.nodes)))
    data = record.to_dict()
    for node in output.all_input_nodes:
        if isinstance(node, Node) and node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: data}

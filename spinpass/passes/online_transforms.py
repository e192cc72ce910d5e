"""Online transforms by the modules they stand in:  Hadamards of a graph  <->  (module, location, rotation).

| location | where the rotation stands |
|---|---|
| ``input`` | x -> x R in front of the linear layer whose weight is ``module.weight`` |
| ``q_attn`` | q -> q R in front of the attention that is computed in ``module``, after RoPE |
| ``k_cache`` | k -> k R likewise, before keys are kept and heads repeated |

It is what checkpoint layouts can say of a program that is not offline alone. Both directions read the graph, its
parameters' names and the modules that its nodes came from; what has no such place is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.analysis import Concatenate, Linear, Movement, find_attention, find_linears, rule_of
from spinpass.errors import ConfigError
from spinpass.graph import Layout, ProgramEditor, arguments, is_op, op_name, shape, value
from spinpass.operators import HADAMARD
from spinpass.rotations import Rotation

from .insert_rotations import rotate_value

TransformLocation = Literal["input", "q_attn", "k_cache"]
LOCATIONS: tuple[TransformLocation, ...] = get_args(TransformLocation)
_WEIGHT = ".weight"
_TRANSPOSES = ("aten::t", "aten::transpose", "aten::numpy_T")
_MATRICES = re.compile(r"spinpass\..*\.(matrix|signs|factor\d+)(_inverse|_dual)?(_\d+)?")
"""The names of constants of rotations by no plain Hadamard."""


@dataclass(frozen=True)
class OnlineTransform:
    """A rotation x -> x R of what a module of the model computes with.

    Attributes:
        module: the path of the module.
        location: what is rotated; see this module.
        rotation: R, of one block: a longer axis has several vectors side by side.
        inverse: x -> x Rᵀ.
    """

    module: str
    location: TransformLocation
    rotation: Rotation
    inverse: bool = False


def online_transforms(program: ExportedProgram) -> tuple[OnlineTransform, ...]:
    """Return the online Hadamards of a rotated program by the modules they belong to, in the order of the graph.

    Raises ConfigError, with the reason, where one of them has no place in a module, or is no plain Hadamard.
    """
    stored = next((name for name in (*program.state_dict, *program.constants) if _MATRICES.fullmatch(name)), None)
    if stored is not None:
        raise ConfigError(
            f"{stored} is of a rotation that stays online and is no plain Hadamard, and a layout declares those alone: "
            "leave out its matrix and its kind, or its rotation"
        )
    editor = ProgramEditor(program)
    places = _Places.of(editor)
    found: list[OnlineTransform] = []
    for node in editor.nodes:
        if op_name(node) != HADAMARD:
            continue
        given = arguments(node)
        rotation = Rotation.create("hadamard", given["order"])
        found += [
            OnlineTransform(module, location, rotation, given["transpose"]) for module, location in places.read(node)
        ]
    return tuple(found)


def with_online_transforms(program: ExportedProgram, transforms: Iterable[OnlineTransform]) -> ExportedProgram:
    """Return the program with the transforms in it. The program given is not changed.

    Raises:
        ConfigError: the program has no such module or location, two transforms claim one, or an axis holds no vectors
            of the rotation's size.
    """
    editor = ProgramEditor(program)
    places = _Places.of(editor)
    claimed: set[tuple[str, TransformLocation]] = set()
    due: dict[tuple[Node, Rotation, bool], tuple[OnlineTransform, list[Node]]] = {}
    for transform in transforms:
        at = (transform.module, transform.location)
        if at in claimed:
            raise ConfigError(f"two transforms are declared of {transform.location} of {transform.module}")
        claimed.add(at)
        for node, user in places.at(transform):
            key = (node, transform.rotation, transform.inverse)  # layers that read one value share its rotation
            due.setdefault(key, (transform, []))[1].append(user)
    for (node, _, _), (transform, users) in due.items():
        _insert(editor, node, users, transform)
    return editor.finish() if due else program


def is_rotated_online(program: ExportedProgram) -> bool:
    """Return whether rotations stand in a program: Hadamards, or matrices and signs that it was rotated by."""
    hadamards = any(op_name(node) == HADAMARD for node in program.graph.nodes)
    return hadamards or any(_MATRICES.fullmatch(name) for name in (*program.state_dict, *program.constants))


def transform_places(program: ExportedProgram) -> dict[TransformLocation, dict[str, tuple[str, int]]]:
    """Return where a program could have transforms: by location the modules, with their class and the channels."""
    return _Places.of(ProgramEditor(program)).widths()


def _insert(editor: ProgramEditor, node: Node, users: Sequence[Node], transform: OnlineTransform) -> None:
    """Let the users of a value read it rotated along its last axis."""
    size, rotation = shape(node)[-1], transform.rotation
    if not isinstance(size, int) or size % rotation.size:
        raise ConfigError(
            f"a transform of {rotation.size} channels is declared of {transform.location} of {transform.module}, which "
            f"has {size}"
        )
    layout = Layout((len(shape(node)) - 1,), (size,), torch.arange(size, device="cpu").reshape(-1, rotation.size))
    origin = f"{transform.location} of {transform.module}"
    editor.replace(node, rotate_value(editor, node, layout, rotation, {}, origin, transform.inverse), users)


@dataclass(frozen=True)
class _Places:
    """Where transforms may stand in a program: by module, each a value with the node that reads it there.

    Attributes:
        inputs: of linear layers, whose weight has the module's name.
        queries: of attentions, before anything but movements lies between.
        keys: of attentions, before they are kept and heads repeated.
        unnamed: by the node of a linear layer, why its input has no name.
    """

    inputs: Mapping[str, Sequence[tuple[Node, Node]]]
    queries: Mapping[str, Sequence[tuple[Node, Node]]]
    keys: Mapping[str, Sequence[tuple[Node, Node]]]
    unnamed: Mapping[Node, str]

    @classmethod
    def of(cls, editor: ProgramEditor) -> _Places:
        """Find all of a program."""
        inputs: dict[str, list[tuple[Node, Node]]] = {}
        unnamed: dict[Node, str] = {}
        for linear in find_linears(editor):
            module = _linear_module(editor, linear)
            if module is None:
                unnamed[linear.node] = _not_a_linear(editor, linear)
            else:
                inputs.setdefault(module, []).append((linear.operand, linear.node))
        queries: dict[str, list[tuple[Node, Node]]] = {}
        keys: dict[str, list[tuple[Node, Node]]] = {}
        for attention in find_attention(editor):
            width, module = attention.query_layout.width, _scope(attention.node)[0]
            for found, operand in ((queries, attention.query), (keys, attention.key)):
                made = _made(operand, width)
                if made and module:
                    found.setdefault(module, []).extend(made)
        return cls(inputs, queries, keys, unnamed)

    def at(self, transform: OnlineTransform) -> Sequence[tuple[Node, Node]]:
        """Return where a transform stands. Raises ConfigError where the program has no such place."""
        found = self._by_location[transform.location].get(transform.module)
        if found is None:
            raise ConfigError(
                f"a transform is declared of {transform.location} of {transform.module}, which the program has not"
            )
        return found

    def widths(self) -> dict[TransformLocation, dict[str, tuple[str, int]]]:
        """Return of every place the module's class and the channels that are rotated."""
        found: dict[TransformLocation, dict[str, tuple[str, int]]] = {}
        for location, places in self._by_location.items():
            sizes = {module: (pairs, shape(pairs[0][0])[-1]) for module, pairs in places.items()}
            found[location] = {
                module: (_scope(pairs[0][1])[1], size)
                for module, (pairs, size) in sizes.items()
                if isinstance(size, int)
            }
        return found

    def read(self, node: Node) -> list[tuple[str, TransformLocation]]:
        """Return the places at which a rotated value is read. Raises ConfigError where it is read elsewhere, too."""
        readers: dict[Node, tuple[str, TransformLocation]] = {}
        for location, places in self._by_location.items():
            for module, found in places.items():
                readers |= {user: (module, location) for value, user in found if value is node}
        if not readers:  # behind views that keep vectors whole
            return [place for user in _readers(node) for place in self._behind(node, user)]
        for user in _readers(node):
            if user not in readers:
                raise ConfigError(f"{node.name}, an online rotation, is also read by {user.name}{self._why(user)}")
        return list(readers.values())

    def _behind(self, node: Node, user: Node) -> list[tuple[str, TransformLocation]]:
        if is_op(user) and isinstance(rule_of(user), Movement) and shape(user)[-1:] == shape(node)[-1:]:
            return self.read(user)
        raise ConfigError(
            f"{node.name}, an online rotation, is read by {user.name} ({op_name(user)}){self._why(user)}: a layout has "
            "names for the inputs of linear layers, for queries and for keys alone"
        )

    def _why(self, user: Node) -> str:
        return f", {self.unnamed[user]}" if user in self.unnamed else ""

    @property
    def _by_location(self) -> Mapping[TransformLocation, Mapping[str, Sequence[tuple[Node, Node]]]]:
        return {"input": self.inputs, "q_attn": self.queries, "k_cache": self.keys}


def _scope(node: Node) -> tuple[str, str]:
    """Return the path and the class of the module whose code a node came from; empty where the program does not say."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return str(path), name.rpartition(".")[2]


def _linear_module(editor: ProgramEditor, linear: Linear) -> str | None:
    """Return the path of the module that is this linear layer and no more: its weight (out, in) has its name."""
    weight, dim = linear.weight, linear.weight_dim
    if op_name(weight) in _TRANSPOSES and len(shape(weight)) == 2:
        weight, dim = weight.all_input_nodes[0], 1 - dim
    module, last = _scope(linear.node)[0], len(shape(linear.operand)) - 1
    whole = editor.is_stored(weight) and len(shape(weight)) == 2 and dim == 1 and linear.dim == last
    return module if whole and f"{module}{_WEIGHT}" in editor.fqns(weight) else None


def _not_a_linear(editor: ProgramEditor, linear: Linear) -> str:
    return f"whose weight, {editor.fqn(linear.weight)}, is not that of a torch.nn.Linear of that name"


def _readers(node: Node) -> list[Node]:
    """Return who reads the values of a node, and not its sizes."""
    return [user for user in node.users if isinstance(value(user), Tensor)]


def _made(operand: Node, width: int) -> list[tuple[Node, Node]]:
    """Return where a query or key is made, vectors of ``width`` channels on its last axis, and who reads it there.

    Views, repeated heads and keys that were kept before are looked through.
    """
    node, readers = operand, _readers(operand)
    while node.op == "call_function":
        rule = rule_of(node)
        if isinstance(rule, Movement):
            source = rule.source
        elif isinstance(rule, Concatenate) and rule.dim != len(shape(node)) - 1:
            fresh = [each for each in rule.sources if each.op != "placeholder"]
            source = fresh[0] if len(fresh) == 1 else node
        else:
            break
        if source is node or (shape(node)[-1] == width and shape(source)[-1] != width):
            break
        node, readers = source, [node]
    return [(node, reader) for reader in readers] if shape(node)[-1] == width else []

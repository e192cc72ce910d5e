"""What every edit of a program keeps, checked on what the edit has changed.

The whole graph is compared with what it was by identity, which is cheap and sees edits by any route; only nodes that
are new or read something else than before are looked at closely.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.errors import InvariantError

from .editor import ProgramEditor
from .nodes import is_check, mutates, shape, value

_arguments, _target = operator.attrgetter("_args"), operator.attrgetter("target")


@dataclass(frozen=True)
class Changes:
    """What has become of a program since it was last looked at.

    Attributes:
        made: the nodes that are new.
        altered: the nodes that read other operands than before.
        removed: how many nodes are gone.
        queued: how many steps were added to the queue of each constant that got any.
    """

    made: tuple[Node, ...]
    altered: tuple[Node, ...]
    removed: int
    queued: Mapping[Node, int]

    @property
    def graph(self) -> bool:
        """Return whether the graph is another one; otherwise at most constants have changed."""
        return bool(self.made or self.altered or self.removed)


class Invariants:
    """A guard that compares a program with what it was at the last :meth:`check`, or when the guard was made.

    Raises:
        InvariantError: the program is broken to begin with.
    """

    def __init__(self, editor: ProgramEditor) -> None:
        self._editor = editor
        self._nodes: list[Node] = []
        self._arguments: list[Any] = []  # of each node, in the same order
        self._targets: list[Any] = []  # likewise
        self._known: dict[Node, tuple[Any, Any, Any]] = {}  # of each node both kinds of arguments, and the target
        self._named: list[Node] = []  # the nodes that have named arguments
        self._specs: list[Any] = []  # of the signature
        self._steps = 0  # of the editor's log
        self._interface = _interface(editor)
        self.check()

    def check(self) -> Changes:
        """Make sure that what has changed may change, and return it.

        Raises:
            InvariantError: an operand is not computed before its reader, or not part of the graph; a value that is read
                is not recorded; a node reads a value of another shape or dtype than it was recorded with, computes
                something else than before, or writes into a value; a check is gone; the program takes or returns
                something else than before. The message names the node.
        """
        log = self._editor.queued()
        queued = Counter(log[self._steps :])
        self._steps = len(log)
        # arguments are read straight from the attributes: the properties of Node cost more than all the rest
        nodes = list(self._editor.nodes)
        arguments, targets = list(map(_arguments, nodes)), list(map(_target, nodes))
        specs = [*self._editor.inputs, *self._editor.outputs]
        pairs = ((nodes, self._nodes), (arguments, self._arguments), (targets, self._targets))
        same = all(_identical(*pair) for pair in (*pairs, (specs, self._specs)))
        if same and all(self._known[n][1] is n._kwargs for n in self._named):
            return Changes((), (), 0, queued)
        head = min(_common(*pair) for pair in pairs)
        tail = min(_common(now[:head:-1], before[:head:-1]) for now, before in pairs)
        between = nodes[head : len(nodes) - tail]
        made = [n for n in between if n not in self._known]
        altered = [n for n in between if n in self._known and not _identical(self._known[n][::2], (n._args, n.target))]
        altered += [n for n in self._named if self._known[n][1] is not n._kwargs and n not in altered]
        gone = self._nodes[head : len(self._nodes) - tail]
        removed = len(gone) + len(made) - len(between)
        for node in dict.fromkeys((*between, *altered)):  # what has moved is between as well
            _check_operands(node)
        for node in made:
            if mutates(node):
                raise InvariantError(f"{node.name} writes into {node.all_input_nodes[0].name}: the graph is functional")
        for node in altered:
            if self._known[node][2] is not node.target:
                raise InvariantError(f"{node.name} computes {node.target}, not {self._known[node][2]} as before")
            _check_values(node, self._known[node][:2])
        for lost in set(gone) - set(between) if removed else ():
            if is_check(lost):
                raise InvariantError(f"{lost.name}, a check of what the program is given, is gone")
        if removed or not _identical(specs, self._specs) or any(n.op != "call_function" for n in (*made, *altered)):
            self._check_interface()
        for node in gone:
            del self._known[node]
        self._known |= {n: (n._args, n._kwargs, n.target) for n in (*between, *altered)}
        self._named = [n for n in self._named if n in self._known] + [n for n in made if n._kwargs]
        self._nodes, self._arguments, self._targets, self._specs = nodes, arguments, targets, specs
        return Changes(tuple(made), tuple(altered), removed, queued)

    def _check_interface(self) -> None:
        now = _interface(self._editor)
        for kind, old, new in (("takes", self._interface[0], now[0]), ("returns", self._interface[1], now[1])):
            if old != new:
                changed = next((pair for pair in zip(old, new) if pair[0] != pair[1]), (len(old), len(new)))
                raise InvariantError(f"the program {kind} something else than before: {changed[1]}, not {changed[0]}")


def _interface(editor: ProgramEditor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what the program takes and what it returns, to be compared.

    The first is (name, dtype, shape) of every user input; the second is (kind, mutation target, dtype, shape) of
    every output, and how many values are returned.
    """
    takes = tuple((n.name, *_form(n)) for n in editor.user_inputs())
    returned: Any = editor.output_node.args[0]
    returns = ((spec.kind.name, spec.target, *_form(node)) for spec, node in zip(editor.outputs, returned))
    return takes, (*returns, f"{len(returned)} values")


def _form(argument: Any) -> tuple[Any, ...]:
    """Return dtype and shape of a tensor that enters or leaves the program, and the type of anything else."""
    val = value(argument) if isinstance(argument, Node) else argument
    return (str(val.dtype), shape(argument)) if isinstance(val, Tensor) else (type(val).__name__,)


def _identical(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _common(these: list[Any], those: list[Any]) -> int:
    """Return how many elements from the front on are the same objects."""
    same = list(map(operator.is_, these, those))
    return same.index(False) if False in same else len(same)


def _check_operands(node: Node) -> None:
    for operand in node.all_input_nodes:
        if operand.graph is not node.graph or operand._erased:
            raise InvariantError(f"{node.name} reads {operand.name}, which is not in the graph")
        if not operand < node:
            raise InvariantError(f"{node.name} reads {operand.name}, which is computed after it")
        if node not in operand.users:
            raise InvariantError(f"{node.name} reads {operand.name}, which does not have it among its users")
    if node.op == "call_function" and node.users and "val" not in node.meta:
        raise InvariantError(f"{node.name} has no recorded value")


def _check_values(node: Node, arguments: Any) -> None:
    """Make sure that operands were exchanged for others of their shape and dtype: the recorded value is of those."""
    if node.op != "call_function":
        return
    before, after = _operands(arguments), _operands([node.args, node.kwargs])
    for old, new in zip(before, after):
        if old is not new and _kind(old) != _kind(new):
            raise InvariantError(
                f"{node.name} reads {new.name}, {_shown(new)}, in place of {old.name}, {_shown(old)}, and its recorded "
                "value was not made anew"
            )


def _operands(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found


def _kind(node: Node) -> tuple[Any, ...]:
    val = value(node)
    return (val.dtype, shape(node)) if isinstance(val, Tensor) else (type(val),)


def _shown(node: Node) -> str:
    val = value(node)
    if not isinstance(val, Tensor):
        return type(val).__name__
    return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, shape(node)))}]"

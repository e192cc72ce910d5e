"""Functionalize:  x.op_(y); f(x)  ->  x' = op(x, y); f(x').   A write through a view is put back into what is viewed.

    v = x[..., a:b]; v.copy_(y); f(x)  ->  f(slice_scatter(x, y, a, b));   writes that cover x  ->  f(cat(y, ...))

Only the in-place operators and what reads the written memory change. Everything else stays as it was exported;
``run_decompositions`` traces the program again and does not promise that. What is written into an input (a KV cache)
becomes an output that updates it. ``run_decompositions`` is used where memory of a buffer is written, and where a write
cannot be expressed in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ProgramError
from spinpass.graph import (
    ProgramEditor,
    arguments,
    copied_graph,
    decomposed,
    functional_target,
    is_context,
    is_op,
    mutates,
    op_name,
    shape,
    shares_memory,
    splice,
    value,
)

from .canonicalize import canonicalize
from .centre_statistics import centre_statistics
from .collect_affine import collect_affine
from .decompose import decompose
from .memory_check import wrong_read

aten = torch.ops.aten


def open_program(program: ExportedProgram) -> ProgramEditor:
    """Return an editor over a copy of the program without in-place operators.

    Raises:
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
    """
    editor = ProgramEditor(program)
    if any(map(is_context, editor.nodes)):
        editor = ProgramEditor(_without_contexts(program))
    try:
        functionalize(editor)
    except _Unsupported:
        editor = ProgramEditor(program.run_decompositions({}))
    editor.cleanup()  # what no output depends on reads nothing
    canonicalize(editor)
    decompose(editor)
    collect_affine(editor)
    centre_statistics(editor)
    editor.cleanup()  # what was rewritten
    return editor


def _without_contexts(program: ExportedProgram) -> ExportedProgram:
    """Return the program with what stands under autocast or no_grad in its own graph, every cast written out.

    Raises:
        ProgramError: torch cannot trace through it.
    """
    try:
        traced: ExportedProgram = program.run_decompositions({})
        return traced
    except Exception as error:  # whatever torch runs into
        raise ProgramError(
            f"what stands under autocast, no_grad or vmap in the program cannot be traced ({type(error).__name__}: "
            f"{error}); export the model without it"
        ) from error


_Shown = dict[Node, Node | None]
"""By node, the operand whose memory its result shows; None where it has memory of its own."""


class _Unsupported(Exception):
    """A write that cannot be expressed in the graph."""


def functionalize(editor: ProgramEditor) -> None:
    """Replace every in-place operator of the graph.

    Raises:
        _Unsupported: memory of a constant is written, or a write cannot be put back into what is viewed.
    """
    detached = [n for n in editor.nodes if op_name(n) == "aten::detach_"]  # which changes no value
    for node in detached:
        node.replace_all_uses_with(node.all_input_nodes[0])
    editor.erase(detached)
    if not any(map(mutates, editor.nodes)):
        return
    shown = _spell_out_views(editor)
    exported = copied_graph(editor.graph)
    memory = _Memory(editor, shown)
    for node in list(editor.nodes):
        if mutates(node):
            memory.write(node)
        elif node.op not in ("placeholder", "get_attr"):
            memory.read(node)
    memory.return_inputs()
    wrong = wrong_read(exported, editor, [*memory.roots, *memory.views], memory.roots, memory.reads)
    if wrong:
        raise _Unsupported(f"{wrong} would see other values")
    editor.erase(memory.written)


def _spell_out_views(editor: ProgramEditor) -> _Shown:
    """Replace what shows written memory without its schema saying so (an einsum of one operand) by what it is made of.

    Return what is known of the views then.

    Raises:
        _Unsupported: torch does not say what that is.
    """
    while True:
        shown: _Shown = {}
        views = [view for view in _Memory(editor, shown).views if is_op(view) and not mutates(view)]
        node = next((v for v in views if not v.target.is_view and op_name(v) not in _KNOWN), None)  # type: ignore[union-attr]
        if node is None:
            return shown
        parts = decomposed(editor, node)
        if parts is None:
            raise _Unsupported(f"a view by {op_name(node)}")
        splice(editor, node, parts)


class _Memory:
    """Which nodes view which memory, and which node holds its contents at the point of the graph that is reached."""

    def __init__(self, editor: ProgramEditor, shown: _Shown) -> None:
        self.editor = editor
        self._known = shown
        self.written: list[Node] = []
        self._viewed: dict[Node, Node] = {}  # view -> what it is a view of
        self._views: dict[Node, set[Node]] = {}  # root -> all views of its memory
        self._current: dict[Node, Node] = {}
        self._shown: dict[Node, Node] = {}  # view -> its operand by now, where reads of that were redirected
        self._stale: set[Node] = set()
        self.reads: dict[tuple[str, str], Node] = {}  # by reader and what it reads, as exported
        self._inputs = set(editor.user_inputs())
        for node in editor.nodes:
            if mutates(node):
                self._find_memory(_written(node))

    def _find_memory(self, node: Node) -> None:
        """Note all views of the whole memory that a write to ``node`` may touch."""
        root = node
        while (source := self._source(root)) is not None:
            root = source
        if root.op != "call_function" and root not in self._inputs:
            raise _Unsupported(f"{root.name} is memory of a constant")
        if root in self._views:
            return
        views: set[Node] = set()
        todo = [root]
        while todo:
            here = todo.pop()
            for user in here.users:
                if user not in views and self._source(user) is here:
                    views.add(user)
                    self._viewed[user] = here
                    todo.append(user)
        self._views[root] = views

    @property
    def roots(self) -> list[Node]:
        """The values that own written memory."""
        return list(self._views)

    @property
    def views(self) -> list[Node]:
        """All that show written memory without owning it, operators that write included."""
        return [view for views in self._views.values() for view in views]

    def _source(self, node: Node) -> Node | None:
        if node not in self._known:
            self._known[node] = _viewed(self.editor, node)
        return self._known[node]

    def read(self, node: Node) -> None:
        """Let ``node`` read what its operands hold by now."""
        for source in node.all_input_nodes:
            now = self._contents(source, node)
            if node not in self._viewed and (source in self._viewed or source in self._views):
                self.reads[node.name, source.name] = now
            if now is not source:
                node.replace_input_with(source, now)
                if self._viewed.get(node) is source:
                    self._shown[node] = now

    def write(self, node: Node) -> None:
        """Compute what ``node`` writes and put it into everything that shows the memory."""
        self.read(node)
        self.written.append(node)
        target = self._viewed[node]  # as the graph named it before reads were redirected
        old = self._contents(target, node)
        new = self._result(node, old)
        path = self._put_back(target, new, node)
        for view in self._views[self._root(target)]:
            if view not in path:
                self._stale.add(view)
        self._current[node] = new
        self._stale.discard(node)

    def return_inputs(self) -> None:
        """Let the program return what it has written into its inputs, as outputs that update them."""
        for root in self._views:
            if root in self._inputs:
                self.editor.add_mutation(root, self._contents(root, self.editor.output_node))

    def _root(self, node: Node) -> Node:
        while node in self._viewed:
            node = self._viewed[node]
        return node

    def _contents(self, node: Node, at: Node) -> Node:
        """Return the node that holds ``node``'s contents, made anew before ``at`` where a write has outdated it."""
        if node not in self._stale:
            return self._current.get(node, node)
        source = self._contents(self._viewed[node], at)
        operand = self._shown.get(node, self._viewed[node])
        again = source if mutates(node) else self.editor.repeat(node, {operand: source}, before=at)
        self._current[node] = again
        self._stale.discard(node)
        return again

    def _result(self, node: Node, old: Node) -> Node:
        """Return a node that computes what the in-place operator writes."""
        if op_name(node) == "aten::copy_":
            return self._copied(node, old)
        target = functional_target(node)
        if target is None:
            raise _Unsupported(f"{op_name(node)} has no counterpart that returns its result")
        new = self._call(node, target, old, *node.args[1:], **node.kwargs)
        if value(new).dtype != value(old).dtype:
            new = self._call(node, aten.to.dtype, new, value(old).dtype)
        return new

    def _copied(self, node: Node, old: Node) -> Node:
        source = arguments(node)["src"]
        if value(source).dtype != value(old).dtype:
            source = self._call(node, aten.to.dtype, source, value(old).dtype)
        return source if shape(source) == shape(old) else self._call(node, aten.expand_as.default, source, old)

    def _put_back(self, view: Node, new: Node, at: Node) -> set[Node]:
        """Write ``new`` through the chain of views up to the memory's root; return the views that are up to date."""
        path = {view}
        self._current[view] = new
        self._stale.discard(view)
        while view in self._viewed:
            source, through = self._viewed[view], view
            if op_name(view) == "getitem":
                source, through = self._viewed[source], source
            if mutates(view) or op_name(through) in _IDENTITIES:
                pass
            else:
                new = self._scattered(view, through, self._contents(source, at), new, at)
            self._current[source] = new
            self._stale.discard(source)
            path.add(source)
            view = source
        return path

    def _scattered(self, view: Node, through: Node, whole: Node, part: Node, at: Node) -> Node:
        """Return ``whole`` with ``part`` where the view operator ``through`` looks."""
        name, args = op_name(through), arguments(through)
        if name in _RESHAPES:
            return self._call(at, aten.view_as.default, part, whole)
        if name in ("aten::transpose", "aten::swapaxes"):
            dims = [d for d in args.values() if isinstance(d, int)]
            return self._call(at, aten.transpose.int, part, *dims)
        if name == "aten::permute":
            rank = len(args["dims"])
            inverse = sorted(range(rank), key=lambda d: args["dims"][d] % rank)
            return self._call(at, aten.permute.default, part, inverse)
        if name in ("aten::t", "aten::numpy_T") and len(shape(whole)) == 2:
            return self._call(at, aten.transpose.int, part, 0, 1)
        if name == "aten::slice":
            bounds = (args["start"], args["end"], args["step"])
            return self._call(at, aten.slice_scatter.default, whole, part, args["dim"], *bounds)
        if name == "aten::narrow" and isinstance(args["start"], int) and isinstance(args["length"], int):
            end = args["start"] + args["length"]
            return self._call(at, aten.slice_scatter.default, whole, part, args["dim"], args["start"], end)
        if name == "aten::select":
            return self._call(at, aten.select_scatter.default, whole, part, args["dim"], args["index"])
        if name == "aten::unbind":
            return self._call(at, aten.select_scatter.default, whole, part, args["dim"], view.args[1])
        if name in ("aten::split", "aten::split_with_sizes", "aten::chunk"):
            lengths = [v.shape[args["dim"]] for v in value(through)]
            which = view.args[1]
            if all(isinstance(n, int) for n in lengths) and isinstance(which, int):
                start = sum(lengths[:which])
                end = start + lengths[which]
                return self._call(at, aten.slice_scatter.default, whole, part, args["dim"], start, end)
        raise _Unsupported(f"a write through {name}")

    def _call(self, at: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Return a new node right before ``at``; scatters that cover the whole axis become a concatenation."""
        made = self.editor.call(target, *args, after=at.prev, origin="Functionalize", **kwargs)
        parts = _covering_parts(made)
        if parts is None:
            return made
        dim = arguments(made)["dim"]
        return self.editor.call(aten.cat.default, parts, dim, after=at.prev, origin="Functionalize")


def _written(node: Node) -> Node:
    """Return the tensor that an in-place operator writes, which must be its first argument and no other."""
    first = next(iter(arguments(node).values()))
    if not isinstance(first, Node) or (functional_target(node) is None and op_name(node) != "aten::copy_"):
        raise _Unsupported(f"{op_name(node)} writes otherwise than into its first argument")
    return first


def _viewed(editor: ProgramEditor, node: Node) -> Node | None:
    """Return the operand whose memory the node's result shows, or None where it has memory of its own."""
    if node.op != "call_function":
        return None
    if op_name(node) == "getitem":
        source = node.all_input_nodes[0]
        return source if _viewed(editor, source) is not None else None
    if not is_op(node):
        return None
    if mutates(node):
        return _written(node)
    return next((s for s in node.all_input_nodes if shares_memory(editor, node, s)), None)


def _covering_parts(node: Node) -> list[Node] | None:
    """Return the parts, in order, where nested scatters along one axis overwrite all of it; None where they do not."""
    parts: dict[tuple[int, int], Node] = {}
    here, dim, size = node, None, None
    while op_name(here) == "aten::slice_scatter":
        args = arguments(here)
        size = shape(here)[args["dim"]]
        at = args["dim"] % len(shape(here))
        bounds = (args["start"] or 0, args["end"] if args["end"] is not None else size)
        if (dim is not None and at != dim) or args["step"] != 1 or not all(isinstance(b, int) for b in (*bounds, size)):
            return None
        dim = at
        start, end, _ = slice(*bounds).indices(size)
        if not any(start < e and s < end for s, e in parts):
            parts[start, end] = args["src"]
        elif not any(s <= start and end <= e for s, e in parts):
            return None
        if _covers(parts, size):
            return [parts[at] for at in sorted(parts)]
        here = args["self"]
    return None


def _covers(parts: Iterable[tuple[int, int]], size: int) -> bool:
    """Return whether the parts, as (start, end), lie side by side from 0 to ``size``."""
    reached = 0
    for start, end in sorted(parts):
        if start != reached:
            return False
        reached = end
    return reached == size


_IDENTITIES = frozenset(
    f"aten::{n}"
    for n in (
        "alias",
        "detach",
        "to",
        "contiguous",
        "lift_fresh",
        "dropout",
        "feature_dropout",
        "type_as",
    )
)
_RESHAPES = frozenset(
    f"aten::{n}"
    for n in (
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "view_as",
        "_unsafe_view",
        "reshape_as",
    )
)
_KNOWN = _IDENTITIES | _RESHAPES

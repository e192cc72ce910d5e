"""ProgramEditor: a private copy of an exported program, whose graph and constants passes edit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from spinpass.errors import InvariantError, ProgramError, QuantizedWeightError
from spinpass.progress import Progress

from .checks import PACKED_TYPES, check_program
from .constants import Constants
from .expressions import Expressions
from .folding import Step, queued
from .handles import fake_parameter
from .nodes import is_check, is_composed, mutates, value


class ProgramEditor:
    """A copy of ``program`` whose graph and constants can be edited; :meth:`finish` returns a new ExportedProgram.

    The analysis needs a program without in-place operators: see :func:`spinpass.passes.open_program`.

    Raises:
        ProgramError: ``program`` is not an inference program over dense tensors, or lacks a constant that it names.
        QuantizedWeightError: some of its weights are quantized or packed.
    """

    def __init__(self, program: ExportedProgram) -> None:
        check_program(program)
        self._source = program
        self.graph = copied_graph(self._source.graph)
        self.inputs: list[InputSpec] = copy.deepcopy(self._source.graph_signature.input_specs)
        self.outputs = copy.deepcopy(self._source.graph_signature.output_specs)
        placeholders = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        updated = {s.target for s in self.outputs if s.kind == OutputKind.BUFFER_MUTATION and s.target is not None}
        self._constants = Constants(self._source, placeholders, updated)
        self._expressions = Expressions(self._constants)
        self._successors: dict[Node, Node] = {}
        self.under_way = ""  # the pass that edits, for errors in what it queues

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterable[Node]:
        """Return all nodes, in the order of the graph."""
        return self.graph.nodes

    @property
    def output_node(self) -> Node:
        """Return the node that returns the program's outputs."""
        last: Node = next(iter(reversed(self.graph.nodes)))
        return last

    @property
    def mutated_buffers(self) -> set[Node]:
        """Return the placeholders of the buffers that the program updates."""
        return self._constants.updated

    def is_constant(self, node: Node) -> bool:
        """Return whether the value depends on parameters, buffers and lifted tensors only.

        Its shape may depend on dynamic sizes.
        """
        return self._expressions.is_constant(node)

    def is_weight(self, node: Node) -> bool:
        """Return whether the node is a constant, or one matrix per token gathered from a constant stack of matrices.

        The latter are the experts of a mixture.
        """
        return self._expressions.is_weight(node)

    def is_computable(self, node: Node) -> bool:
        """Return whether the node is a constant whose value no dynamic size goes into: it is known without a run."""
        return self._expressions.is_computable(node)

    def canonical(self, node: Node) -> Node:
        """Return the first node that computes the same constant expression: ``1 + g`` twice is one scale."""
        return self._expressions.canonical(node)

    def deferred(self, node: Node, given: Mapping[Node, Tensor] = MappingProxyType({})) -> Callable[[], Tensor]:
        """Return what computes the float64 value that a constant node has now.

        See :meth:`.expressions.Expressions.deferred`.
        """
        return self._expressions.deferred(node, given)

    def is_stored(self, node: Node) -> bool:
        """Return whether the node is the placeholder of a parameter, buffer or lifted tensor."""
        return node in self._constants

    def fqn(self, node: Node) -> str:
        """Return the name of the constant in the model's state dict; a computed constant has its node's name."""
        return self._constants[node].fqn if node in self._constants else node.name

    def fqns(self, node: Node) -> list[str]:
        """Return all names under which the constant is stored, the node's own first."""
        return self._constants.fqns(node)

    def parameter_names(self) -> set[str]:
        """Return all names under which constants are stored."""
        return {name for node in self._constants for name in self._constants.fqns(node)}

    def has_alias(self, node: Node) -> bool:
        """Return whether the constant is stored under a further name, which nothing reads."""
        return self._constants.has_alias(node)

    def nbytes(self) -> int:
        """Return the bytes that all distinct constants take."""
        return self._constants.nbytes

    def check_weights(self, weights: Iterable[Node]) -> None:
        """Raise QuantizedWeightError where a linear layer's weight is unpacked from integers inside the program.

        Integers beside a floating-point tensor of at least as many elements are no codes, but a mask that prunes it or
        the order of its rows.
        """
        for weight in weights:
            behind = {node: self._constants[node].tensor for node in self._expressions.behind(weight)}
            most = max((t.numel() for t in behind.values() if t.is_floating_point()), default=0)
            for node, tensor in behind.items():
                if tensor.dtype in PACKED_TYPES and tensor.numel() > most:
                    raise QuantizedWeightError(
                        f"{self.fqn(node)} is a quantized or packed weight ({tensor.dtype}); "
                        "rotate the floating-point program first and quantize the result"
                    )

    def user_inputs(self) -> list[Node]:
        """Return the placeholders of what the caller gives, in order."""
        names = {s.arg.name for s in self.inputs if s.kind == InputKind.USER_INPUT}
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in names]

    def mutated(self, kind: OutputKind, target: str | None) -> Node:
        """Return the placeholder of the buffer or user input that an output of this kind updates."""
        if kind == OutputKind.BUFFER_MUTATION:
            return next(n for n in self.mutated_buffers if self.fqn(n) == target)
        return next(n for n in self.user_inputs() if n.name == target)

    def output_values(self) -> Iterator[tuple[int, OutputKind, str | None, Node]]:
        """Yield (index, kind, mutation target, node) of every tensor that leaves the program."""
        for i, (spec, node) in enumerate(zip(self.outputs, self.output_node.args[0])):  # type: ignore[arg-type]
            if isinstance(node, Node):
                yield i, spec.kind, spec.target, node

    def add_mutation(self, node: Node, new: Node) -> None:
        """Let ``new`` be what a user input holds after the program has run."""
        at = next((i for i, s in enumerate(self.outputs) if s.kind == OutputKind.USER_OUTPUT), len(self.outputs))
        self.outputs.insert(at, OutputSpec(OutputKind.USER_INPUT_MUTATION, TensorArgument(new.name), node.name))
        returned = list(self.output_node.args[0])  # type: ignore[arg-type]
        returned.insert(at, new)
        self.output_node.args = (tuple(returned),)

    def user_output_index(self, index: int) -> int:
        """Return which of the user outputs the graph's output ``index`` is."""
        return sum(s.kind == OutputKind.USER_OUTPUT for s in self.outputs[:index])

    def queued(self) -> Sequence[Node]:
        """Return the constant of every step that was queued, in that order."""
        return self._constants.log

    # -- editing the graph --------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, after: Node, origin: str, **kwargs: Any) -> Node:
        """Insert ``target(*args, **kwargs)`` right after a node, with its fake value, and ``origin`` as provenance.

        Raises:
            ProgramError: no values are recorded in the program.
        """
        following = after.next
        while following.op == "placeholder":
            following = following.next
        with self.graph.inserting_before(following):
            node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = map_arg(args, value), map_arg(kwargs, value)
        with self.fake_mode():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        for key in ("nn_module_stack", "torch_fn", "source_fn_stack"):
            if key in after.meta:
                node.meta[key] = after.meta[key]
        node.meta["stack_trace"] = f"inserted by spinpass: {origin}"
        node.meta["custom"] = {"spinpass_origin": origin}
        return node

    def repeat(self, node: Node, instead: dict[Node, Node], *, before: Node) -> Node:
        """Copy ``node`` to right before another node, with other operands; the copy has the same fake value."""
        with self.graph.inserting_before(before):
            return self.graph.node_copy(node, lambda n: instead.get(n, n))

    def erase(self, nodes: Iterable[Node]) -> None:
        """Remove nodes that nothing reads any more, given in the order of the graph."""
        for node in reversed(list(nodes)):
            self.graph.erase_node(node)

    def fake_mode(self) -> Any:
        """Return the mode of the fake tensors that export recorded.

        Raises:
            ProgramError: no values are recorded.
        """
        for node in self.graph.nodes:
            val = value(node)
            if isinstance(val, torch._subclasses.FakeTensor):
                return val.fake_mode
        raise ProgramError(
            "the program has no tensor values recorded (meta['val']); export it with torch.export.export"
        )

    def current(self, node: Node) -> Node:
        """Return what stands for a node by now, which is the node itself if it was not replaced."""
        while node in self._successors:
            node = self._successors[node]
        return node

    def replace(self, node: Node, by: Node, users: Iterable[Node] | None = None) -> None:
        """Let ``users`` read ``by`` instead of ``node``.

        Without ``users`` all of them do, and ``by`` is what :meth:`current` gives for ``node`` from then on.
        """
        if users is None:
            self._successors[node] = by
        for user in list(node.users if users is None else users):
            if user is not by:
                user.replace_input_with(node, by)

    # -- editing constants --------------------------------------------------------------------------------------------

    def queue(self, node: Node, step: Step, mixes: Iterable[int] | None = None) -> None:
        """Apply ``step`` to the constant, in float64, when the program is finished. It must keep the shape.

        It is given pieces cut along other axes than those that it ``mixes``; None: the whole.
        """
        self._constants.queue(node, queued(step, self.under_way, mixes))

    def add_constant(self, name: str, tensor: Tensor, *, steps: Iterable[Step] = ()) -> Node:
        """Add a parameter behind all others, stored under ``name``, which is made unique; return its placeholder."""
        fqn = self._constants.unused_name(name)
        at = 1 + max((i for i, s in enumerate(self.inputs) if s.kind == InputKind.PARAMETER), default=-1)
        by_name = {n.name: n for n in self._constants}
        first = next(iter(self.graph.nodes))
        with (
            self.graph.inserting_after(by_name[self.inputs[at - 1].arg.name])
            if at
            else self.graph.inserting_before(first)
        ):
            node = self.graph.placeholder("p_" + fqn.replace(".", "_"))
        with self.fake_mode():
            node.meta["val"] = fake_parameter(tensor)
        self.inputs.insert(at, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), fqn))
        self._constants.add(node, fqn, tensor, [queued(step, self.under_way) for step in steps])
        return node

    def materialize(self, node: Node) -> Node:
        """Put a stored constant in place of a computed one, for all its readers, and return its placeholder."""
        compute = self.deferred(node)
        val = value(node)
        empty = torch.empty(val.shape, dtype=val.dtype, device=val.device)
        stored = self.add_constant(f"spinpass.{node.name}", empty, steps=[lambda _: compute()])
        self.replace(node, stored)
        return stored

    def retire(self, node: Node, value: float) -> None:
        """Note that what the constant expression ``node`` stood for is folded elsewhere: it is all ``value`` by now.

        Where nothing reads the constant behind it any more, the finished program stores what gives that value, so that
        its state dict fits the architecture that the program was exported from.
        """
        if all(map(self._constants.is_retired, self._expressions.behind(node))):
            return
        found = self._expressions.filling(node, value)
        if found is not None:
            self._constants.retire(*found)

    def split(self, node: Node, users: Iterable[Node]) -> Node:
        """Give ``users`` a constant of their own, equal to ``node``, and return it: this unties them.

        An alias under which the constant is stored is reused where there is one.
        """
        own = self._constants.part_with_alias(node)
        if own is None:
            stored = self._constants[node]
            own = self.add_constant(stored.fqn + "_untied", stored.tensor, steps=stored.steps)
        self.replace(node, own, users)
        return own

    def exact_constants(self) -> dict[str, Callable[[], Tensor]]:
        """Return by placeholder name what computes each edited constant in float64, before the cast to its dtype."""
        return self._constants.exact()

    # -- the result ---------------------------------------------------------------------------------------------------

    def cleanup(self) -> None:
        """Remove what no longer reaches an output. Placeholders stay, because they are the program's interface."""
        for node in reversed(list(self.graph.nodes)):
            dead = node.op == "call_function" and not node.users
            if dead and not mutates(node) and not is_check(node):
                self.graph.erase_node(node)

    def finish(self, progress: Progress | None = None) -> ExportedProgram:
        """Compute the constants and build the program, which torch's verifier checks.

        Args:
            progress: called with (constants done, all constants).

        Raises:
            InvariantError: an edit has changed the shape of a constant, the order of the placeholders, or left a node
                without a recorded value.
        """
        self.cleanup()
        self.graph.lint()
        state_dict, constants = self._constants.store(self.inputs, progress)
        _check_interface(self)
        subgraphs = {
            str(n.target): getattr(self._source.graph_module, str(n.target))
            for n in self.graph.nodes
            if n.op == "get_attr"
        }
        module = GraphModule(copy.deepcopy(subgraphs), self.graph)
        module.meta.update(self._source.graph_module.meta)
        return ExportedProgram(
            root=module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(input_specs=self.inputs, output_specs=self.outputs),
            state_dict=state_dict,
            range_constraints=self._source.range_constraints,
            module_call_graph=self._source.module_call_graph,
            example_inputs=self._source.example_inputs,
            constants=constants,
            verifiers=self._source.verifiers,
        )


def _check_interface(editor: ProgramEditor) -> None:
    """Let the signature name the outputs as they are by now. Raise InvariantError where it fits the graph no more."""
    placeholders = [n.name for n in editor.nodes if n.op == "placeholder"]
    if placeholders != [s.arg.name for s in editor.inputs]:
        raise InvariantError("the placeholders are no longer in the order of the signature")
    for spec, node in zip(editor.outputs, editor.output_node.args[0]):  # type: ignore[arg-type]
        if isinstance(node, Node) and not isinstance(spec.arg, ConstantArgument):
            spec.arg.name = node.name
    for node in editor.nodes:
        if node.op == "call_function" and "val" not in node.meta and node.users:
            raise InvariantError(f"{node.name} has no recorded value")


def shares_memory(editor: ProgramEditor, node: Node, source: Node) -> bool:
    """Return whether the result of ``node`` is a view of ``source``, or ``source`` itself.

    The schemas of operators that are composed of others do not say it: an einsum of one operand is a view, too.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    if not (node.target.is_view or is_composed(node)):
        return False
    operand = value(source)
    if not isinstance(operand, Tensor):
        return False
    with editor.fake_mode():
        made = node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
    results = made if isinstance(made, (list, tuple)) else [made]
    return any(r.untyped_storage()._cdata == operand.untyped_storage()._cdata for r in results if isinstance(r, Tensor))


def copied_graph(graph: Graph) -> Graph:
    """Return a copy of the graph, every node under its name."""
    copied: dict[Node, Node] = {}
    made = Graph()
    output = made.output(made.graph_copy(graph, copied))
    output.meta = copy.copy(next(iter(reversed(graph.nodes))).meta)
    for old, new in copied.items():  # a copy of `input` would be `input_1`, for fx keeps off Python's own names
        if new.name != old.name:
            new.name = old.name
    return made

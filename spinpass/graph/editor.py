"""ProgramEditor: a private copy of an exported program that passes edit. The only file that touches private torch API.

Constants are lazy: a pass queues float64 arithmetic on a constant and nothing is computed until
:meth:`ProgramEditor.finish` applies the whole queue to one constant at a time with a single cast at the end. So a
plan costs no weight arithmetic, many folds that meet in one constant round once, and memory stays near one constant
above the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

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

from .layout import Size

Step = Callable[[Tensor], Tensor]
_CONSTANT_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def is_op(node: Node) -> bool:
    """The node calls an operator of torch (not a Python builtin on symbolic sizes, not ``getitem``)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def op_name(node: Node) -> str:
    """``aten::linear`` for operators, ``getitem`` and the like for builtins, the node kind for the rest."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    bound = {a.name: a.default_value for a in schema}
    bound.update(zip(bound, node.args))
    bound.update(node.kwargs)
    return bound


def mutates(node: Node) -> bool:
    """The operator writes into one of its arguments."""
    return is_op(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def functional_target(node: Node) -> Any:
    """The operator that returns what the in-place operator of ``node`` writes into its first argument; None if none
    does.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if written.count(True) != 1 or not written[0] or torch.Tag.inplace_view in node.target.tags:
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), schema.name.split("::")[1].removesuffix("_"), None)
    found = getattr(packet, schema.overload_name or "default", None)
    if found is None or [a.name for a in found._schema.arguments] != [a.name for a in schema.arguments]:
        return None
    return found


def shares_memory(editor: ProgramEditor, node: Node, source: Node) -> bool:
    """The result of ``node`` is a view of ``source``, or ``source`` itself."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if not (node.target.is_view or op_name(node) in _MAY_RETURN_OPERAND):
        return False
    operand = value(source)
    if not isinstance(operand, Tensor):
        return False
    with editor.fake_mode():
        made = node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
    results = made if isinstance(made, (list, tuple)) else [made]
    return any(r.untyped_storage()._cdata == operand.untyped_storage()._cdata for r in results if isinstance(r, Tensor))


def value(node: Node) -> Any:
    """The fake value that export recorded for the node, or None."""
    return node.meta.get("val")


def known_integers(node: Node) -> Tensor | None:
    """The value of a small lifted index tensor, copies looked through; None where it is only known at run time."""
    while op_name(node) in _COPIES:
        node = node.all_input_nodes[0]
    known = node.meta.get(_KNOWN)
    return known if isinstance(known, Tensor) else None


def elements(node: Node) -> int:
    """How many elements a tensor has, dynamic axes counted as one."""
    total = 1
    for size in shape(node):
        total *= size if isinstance(size, int) else 1
    return total


def shape(node: Node) -> tuple[Size, ...]:
    """Static sizes as ints, dynamic ones as symbolic expressions."""
    val = value(node)
    if not isinstance(val, Tensor):
        return ()
    known = _SHAPES.get(node)
    if known is None:
        known = _SHAPES[node] = tuple(_size(s) for s in val.shape)
    return known


_SHAPES: WeakKeyDictionary[Node, tuple[Size, ...]] = WeakKeyDictionary()  # reading symbolic sizes is slow


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def is_float(node: Node) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and val.is_floating_point()


@dataclass
class Constant:
    """A parameter, buffer or lifted tensor, with the arithmetic still to be done on it."""

    fqn: str
    tensor: Tensor
    steps: list[Step] = field(default_factory=list)

    def compute(self) -> Tensor:
        """The queue applied in float64, cast once."""
        if not self.steps:
            return self.tensor
        with torch.no_grad():
            result = self.compute_float64().to(self.tensor.dtype).contiguous()
        if result.shape != self.tensor.shape:
            raise InvariantError(
                f"{self.fqn}: a fold changed its shape from {tuple(self.tensor.shape)} to {tuple(result.shape)}"
            )
        return result

    def compute_float64(self) -> Tensor:
        """The queue applied; an integer constant as it is."""
        result = self.tensor.detach()
        if not result.is_floating_point():
            return result
        with torch.no_grad():
            result = result.to(torch.float64)
            for step in self.steps:
                result = step(result)
        return result


class ProgramEditor:
    """A copy of ``program`` whose graph and constants can be edited; :meth:`finish` returns a new ExportedProgram.

    Raises ProgramError for anything that is not an inference program over dense tensors. The analysis needs a program
    without in-place operators: see :func:`spinpass.passes.functionalize.open_program`.
    """

    def __init__(self, program: ExportedProgram) -> None:
        check_program(program)
        self._source = program
        copied: dict[Node, Node] = {}
        self.graph = Graph()
        result = self.graph.graph_copy(self._source.graph, copied)
        output = self.graph.output(result)
        output.meta = copy.copy(next(iter(reversed(self._source.graph.nodes))).meta)
        self.inputs: list[InputSpec] = copy.deepcopy(self._source.graph_signature.input_specs)
        self.outputs = copy.deepcopy(self._source.graph_signature.output_specs)
        by_name = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        self._constants: dict[Node, Constant] = {}
        self._aliases: dict[Node, Node] = {}
        self._retired: dict[Node, float] = {}
        mutated = {s.target for s in self.outputs if s.kind == OutputKind.BUFFER_MUTATION}
        stored: dict[tuple[Any, ...], Node] = {}
        for spec in self.inputs:
            if spec.kind not in _CONSTANT_KINDS or spec.target is None:
                continue
            node = by_name[spec.arg.name]
            tensor = self._stored(spec)
            self._constants[node] = Constant(spec.target, tensor)
            if spec.target in mutated:
                continue
            if (
                tensor.dtype == torch.int64
                and tensor.numel() <= _SMALL
                and not isinstance(tensor, torch._subclasses.FakeTensor)
            ):
                node.meta[_KNOWN] = tensor
            first = stored.setdefault(_storage_key(tensor), node)
            if first is not node:
                self._aliases[node] = first
        self.mutated_buffers = {n for n, c in self._constants.items() if c.fqn in mutated}
        self._merge_aliases()
        self._nbytes = sum(c.tensor.nbytes for n, c in self._constants.items() if n not in self._aliases)
        self._constant_nodes: dict[Node, bool] = {}
        self._gathered: dict[Node, bool] = {}
        self._successors: dict[Node, Node] = {}
        self._expressions: dict[Hashable, Node] = {}

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterable[Node]:
        return self.graph.nodes

    @property
    def output_node(self) -> Node:
        last: Node = next(iter(reversed(self.graph.nodes)))
        return last

    def is_constant(self, node: Node) -> bool:
        """The value depends on parameters, buffers and lifted tensors only (its shape perhaps on dynamic sizes)."""
        known = self._constant_nodes.get(node)
        if known is None:
            if node.op == "placeholder":
                known = node in self._constants and node not in self.mutated_buffers
            else:
                tensors = [s for s in node.all_input_nodes if not isinstance(value(s), (int, torch.SymInt))]
                known = is_op(node) and bool(tensors) and all(self.is_constant(s) for s in tensors)
            self._constant_nodes[node] = known
        return known

    def is_weight(self, node: Node) -> bool:
        """A constant, or one matrix per token gathered from a constant stack of them (the experts of a mixture)."""
        if self.is_constant(node):
            return True
        known = self._gathered.get(node)
        if known is None:
            known = self._gathered[node] = self._is_gathered(node)
        return known

    def _is_gathered(self, node: Node) -> bool:
        if not is_op(node) or not is_float(node):
            return False
        if not node.all_input_nodes:
            return False
        source = node.all_input_nodes[0]
        if op_name(node) in _GATHERS:
            return self.is_constant(source) and len(shape(source)) >= 3
        tensors = [s for s in node.all_input_nodes if isinstance(value(s), Tensor)]
        return op_name(node) in _REARRANGEMENTS and tensors == [source] and self.is_weight(source)

    def is_computable(self, node: Node) -> bool:
        """The value of a constant is known without running the program: no dynamic size goes into it."""
        if not self.is_constant(node):
            return False
        return self.is_stored(node) or all(self.is_computable(s) for s in node.all_input_nodes)

    def canonical(self, node: Node) -> Node:
        """The first node that computes the same constant expression: two ``1 + g`` of one ``g`` are one scale."""
        if not self.is_constant(node) or node in self._constants:
            return node
        return self._expressions.setdefault((node.target, self._frozen(node.args), self._frozen(node.kwargs)), node)

    def _frozen(self, argument: Any) -> Hashable:
        """An argument as part of a key, equal expressions as one."""
        if isinstance(argument, Node):
            return self.canonical(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._frozen(a) for a in argument)
        if isinstance(argument, dict):
            return tuple((k, self._frozen(v)) for k, v in argument.items())
        return repr(argument)

    def is_stored(self, node: Node) -> bool:
        """The node is the placeholder of a parameter, buffer or lifted tensor."""
        return node in self._constants

    def fqn(self, node: Node) -> str:
        """The name of the constant in the model's state dict; the node's own name for a computed one."""
        return self._constants[node].fqn if node in self._constants else node.name

    def fqns(self, node: Node) -> list[str]:
        """All names under which the constant is stored."""
        return [self._constants[n].fqn for n in (node, *(a for a, first in self._aliases.items() if first is node))]

    def nbytes(self) -> int:
        """Bytes of all distinct constants."""
        return self._nbytes

    def deferred(self, node: Node, given: Mapping[Node, Tensor] = MappingProxyType({})) -> Callable[[], Tensor]:
        """Computes the float64 value that a constant node has now, whatever is queued later; nothing is computed yet.

        Casts to lower precision inside the expression are lifted to float64 as well. ``given``: values to take in place
        of those of some nodes.
        """
        if node in given:
            return lambda: given[node]
        if node in self._constants:
            constant = self._constants[node]
            now = Constant(constant.fqn, constant.tensor, list(constant.steps))
            return now.compute_float64
        if not self.is_constant(node):
            raise InvariantError(f"{node.name} is not a constant")
        sources = {n: self.deferred(n, given) for n in node.all_input_nodes}
        args, kwargs = lifted(node)
        target = node.target

        def compute() -> Tensor:
            values = {n: source() for n, source in sources.items()}
            actual_args, actual_kwargs = map_arg(args, values.__getitem__), map_arg(kwargs, values.__getitem__)
            with torch.no_grad():
                return target(*actual_args, **actual_kwargs)  # type: ignore[operator,no-any-return]

        return compute

    def user_inputs(self) -> list[Node]:
        names = {s.arg.name for s in self.inputs if s.kind == InputKind.USER_INPUT}
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in names]

    def mutated(self, kind: OutputKind, target: str | None) -> Node:
        """The placeholder of the buffer or user input that an output of this kind updates."""
        if kind == OutputKind.BUFFER_MUTATION:
            return next(n for n in self.mutated_buffers if self.fqn(n) == target)
        return next(n for n in self.user_inputs() if n.name == target)

    def output_values(self) -> Iterator[tuple[int, OutputKind, str | None, Node]]:
        """(index, kind, mutation target, node) of every tensor that leaves the program."""
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
        """The index among the user outputs of output ``index`` of the graph."""
        return sum(s.kind == OutputKind.USER_OUTPUT for s in self.outputs[:index])

    # -- editing the graph --------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, after: Node, origin: str, **kwargs: Any) -> Node:
        """Insert ``target(*args)`` right after a node; the fake value and the provenance are set."""
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
        """A copy of ``node`` right before another, reading other operands; it has the same fake value."""
        with self.graph.inserting_before(before):
            return self.graph.node_copy(node, lambda n: instead.get(n, n))

    def erase(self, nodes: Iterable[Node]) -> None:
        """Remove nodes that nobody reads any more."""
        for node in reversed(list(nodes)):
            self.graph.erase_node(node)

    def fake_mode(self) -> Any:
        for node in self.graph.nodes:
            val = value(node)
            if isinstance(val, torch._subclasses.FakeTensor):
                return val.fake_mode
        raise ProgramError(
            "the program has no tensor values recorded (meta['val']); export it with torch.export.export"
        )

    def current(self, node: Node) -> Node:
        """What stands for a node that was replaced."""
        while node in self._successors:
            node = self._successors[node]
        return node

    def replace(self, node: Node, by: Node, users: Iterable[Node] | None = None) -> None:
        """Let ``users`` (default: all) read ``by`` instead of ``node``."""
        if users is None:
            self._successors[node] = by
        for user in list(node.users if users is None else users):
            if user is not by:
                user.replace_input_with(node, by)

    # -- editing constants --------------------------------------------------------------------------------------------

    def queue(self, node: Node, step: Step) -> None:
        """``constant <- step(constant)`` in float64, when the program is finished."""
        self._constants[node].steps.append(step)

    def add_constant(self, name: str, tensor: Tensor, *, steps: Iterable[Step] = ()) -> Node:
        """A new parameter, stored under ``name`` (made unique), placed among the parameters."""
        taken = {c.fqn for c in self._constants.values()}
        fqn, k = name, 1
        while fqn in taken:
            fqn, k = f"{name}_{k}", k + 1
        at = 1 + max((i for i, s in enumerate(self.inputs) if s.kind == InputKind.PARAMETER), default=-1)
        by_name = {n.name: n for n in self._constants}
        first = next(iter(self.graph.nodes))
        with (
            self.graph.inserting_after(by_name[self.inputs[at - 1].arg.name])
            if at
            else self.graph.inserting_before(first)
        ):
            node = self.graph.placeholder("p_" + fqn.replace(".", "_"))
        with self.fake_mode() as mode:
            node.meta["val"] = mode.from_tensor(torch.nn.Parameter(tensor, requires_grad=False), static_shapes=True)
        self.inputs.insert(at, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), fqn))
        self._constants[node] = Constant(fqn, tensor, list(steps))
        self._nbytes += tensor.nbytes
        return node

    def materialize(self, node: Node) -> Node:
        """A stored constant in place of a computed one, for all its readers."""
        compute = self.deferred(node)
        val = value(node)
        empty = torch.empty(val.shape, dtype=val.dtype, device=val.device)
        stored = self.add_constant(f"spinpass.{node.name}", empty, steps=[lambda _: compute()])
        self.replace(node, stored)
        return stored

    def retire(self, node: Node, value: float) -> None:
        """What the constant expression ``node`` stood for is folded elsewhere, and it is all ``value`` by now.

        Where nothing reads the constant behind it any more, the finished program stores what gives that value, so that
        its state dict fits the architecture that the program was exported from.
        """
        behind = self._behind(node)
        if len(behind) != 1 or behind <= self._retired.keys():
            return
        (stored,) = behind
        tensor = self._constants[stored].tensor
        device = "cpu" if isinstance(tensor, torch._subclasses.FakeTensor) else tensor.device
        for fill in (value, 1.0 - value):  # the value itself, or its distance from 1
            filled = torch.full(tensor.shape, fill, dtype=torch.float64, device=device)
            if bool((self.deferred(node, {stored: filled})() == value).all()):
                self._retired[stored] = fill
                return

    def _behind(self, node: Node) -> set[Node]:
        """The stored constants that a constant expression is computed from."""
        return {node} if node in self._constants else {s for n in node.all_input_nodes for s in self._behind(n)}

    def has_alias(self, node: Node) -> bool:
        """The constant is stored under a further name that nothing reads."""
        return node in self._aliases.values()

    def split(self, node: Node, users: Iterable[Node]) -> Node:
        """Give ``users`` a constant of their own, equal to ``node`` (untying). Its stored alias is reused where
        there is one.
        """
        spare = next((a for a, first in self._aliases.items() if first is node), None)
        if spare is not None:
            del self._aliases[spare]
            self._nbytes += self._constants[node].tensor.nbytes
            self._constants[spare].tensor = self._constants[node].tensor
            self._constants[spare].steps = list(self._constants[node].steps)
        else:
            spare = self.add_constant(
                self.fqn(node) + "_untied", self._constants[node].tensor, steps=self._constants[node].steps
            )
        self.replace(node, spare, users)
        return spare

    def exact_constants(self) -> dict[str, Callable[[], Tensor]]:
        """By placeholder name, what computes each edited constant in float64, before the cast to its stored type."""
        chiefs = {n: self._constants[self._aliases.get(n, n)] for n in self._constants}
        return {n.name: chief.compute_float64 for n, chief in chiefs.items() if chief.steps}

    # -- the result ---------------------------------------------------------------------------------------------------

    def cleanup(self) -> None:
        """Remove what no longer reaches an output. Placeholders stay: they are the program's interface."""
        for node in reversed(list(self.graph.nodes)):
            dead = node.op == "call_function" and not node.users
            if dead and not mutates(node) and not _is_check(node):
                self.graph.erase_node(node)

    def check_weights(self, weights: Iterable[Node]) -> None:
        """Raise QuantizedWeightError where a linear layer's weight is unpacked from integers inside the program."""
        for weight in weights:
            for node in self._behind(weight):
                if self._constants[node].tensor.dtype in _PACKED_TYPES:
                    raise QuantizedWeightError(
                        f"{self.fqn(node)} is a quantized or packed weight ({self._constants[node].tensor.dtype}); "
                        "rotate the floating-point program first and quantize the result"
                    )

    def finish(self, progress: Callable[[int, int], None] | None = None) -> ExportedProgram:
        """Compute the constants and build the program; torch's verifier checks it."""
        self.cleanup()
        self.graph.lint()
        state_dict = dict(self._source.state_dict)
        constants = dict(self._source.constants)
        specs = {s.arg.name: s for s in self.inputs}
        for done, (node, constant) in enumerate(self._constants.items()):
            spec = specs[node.name]
            if constant.steps or (spec.target not in state_dict and spec.target not in constants):
                self._store(spec, constant.compute(), state_dict, constants)
            if progress is not None:
                progress(done + 1, len(self._constants))
        for node, fill in self._retired.items():
            if all(map(_is_check, node.users)):
                neutral = torch.full_like(self._constants[node].tensor, fill)
                self._store(specs[node.name], neutral, state_dict, constants)
        for alias, chief in self._aliases.items():
            held = state_dict if self.fqn(chief) in state_dict else constants
            (constants if self.fqn(alias) in constants else state_dict)[self.fqn(alias)] = held[self.fqn(chief)]
        self._check_interface()
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

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _stored(self, spec: InputSpec) -> Tensor:
        assert spec.target is not None
        found = self._source.state_dict.get(spec.target, self._source.constants.get(spec.target))
        if not isinstance(found, Tensor):
            raise ProgramError(f"the program names a constant {spec.target!r} that it does not hold")
        return found

    def _store(self, spec: InputSpec, tensor: Tensor, state_dict: dict[str, Any], constants: dict[str, Any]) -> None:
        assert spec.target is not None
        if spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and not spec.persistent):
            constants[spec.target] = tensor
            return
        old = self._source.state_dict.get(spec.target)
        wrap = spec.kind == InputKind.PARAMETER
        requires_grad = isinstance(old, torch.nn.Parameter) and old.requires_grad
        state_dict[spec.target] = torch.nn.Parameter(tensor, requires_grad=requires_grad) if wrap else tensor

    def _merge_aliases(self) -> None:
        """One stored tensor under several names becomes one constant: all uses read its first placeholder that is
        used.
        """
        groups: dict[Node, list[Node]] = {}
        for alias, first in self._aliases.items():
            groups.setdefault(first, [first]).append(alias)
        self._aliases = {}
        for members in groups.values():
            chief = next((n for n in members if n.users), members[0])
            for node in members:
                if node is not chief:
                    node.replace_all_uses_with(chief)
                    self._aliases[node] = chief

    def _check_interface(self) -> None:
        placeholders = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        if placeholders != [s.arg.name for s in self.inputs]:
            raise InvariantError("the placeholders are no longer in the order of the signature")
        for spec, node in zip(self.outputs, self.output_node.args[0]):  # type: ignore[arg-type]
            if isinstance(node, Node) and not isinstance(spec.arg, ConstantArgument):
                spec.arg.name = node.name
        for node in self.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta and node.users:
                raise InvariantError(f"{node.name} has no recorded value")


def lifted(node: Node) -> tuple[Any, Any]:
    """The node's arguments with every floating dtype among them raised to float64 (complex64 to complex128)."""

    def lift(arg: Any) -> Any:
        if isinstance(arg, torch.dtype):
            if arg.is_floating_point:
                return torch.float64
            return torch.complex128 if arg.is_complex else arg
        if isinstance(arg, (list, tuple)):
            return type(arg)(lift(a) for a in arg)
        return arg

    return lift(node.args), {k: lift(v) for k, v in node.kwargs.items()}


def check_program(program: object) -> None:
    """Raise ProgramError unless ``program`` is an inference program over dense floating-point weights."""
    if not isinstance(program, ExportedProgram):
        raise ProgramError(
            f"expected a torch.export.ExportedProgram, got {type(program).__name__}; "
            "export the model first: torch.export.export(model, args)"
        )
    for node in program.graph.nodes:
        if not is_op(node):
            continue
        name = op_name(node)
        if _is_active_dropout(node):
            raise ProgramError(
                f"{node.name}: dropout is active (p={_dropout_rate(node)}), so the program computes no "
                "function that could be preserved; call model.eval() before exporting"
            )
        if name.split("::")[0] in _QUANTIZED_NAMESPACES or any(word in name for word in _QUANTIZED_WORDS):
            raise QuantizedWeightError(
                f"{node.name} ({name}) works on quantized or packed weights; rotate the "
                "floating-point program first and quantize the result"
            )
    for fqn, tensor in program.state_dict.items():
        if _is_packed(tensor):
            raise QuantizedWeightError(
                f"{fqn} is a quantized or packed weight ({type(tensor).__name__}, {tensor.dtype}); "
                "rotate the floating-point program first and quantize the result"
            )


def _is_packed(tensor: Tensor) -> bool:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    if tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return True
    return isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())


_KNOWN, _SMALL = "spinpass_known", 4096
_COPIES = {"aten::lift_fresh_copy", "aten::lift_fresh", "aten::detach", "aten::detach_", "aten::clone", "aten::alias"}
_GATHERS = {"aten::index", "aten::index_select"}
_REARRANGEMENTS = {
    f"aten::{n}"
    for n in (
        "transpose",
        "permute",
        "t",
        "numpy_T",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "to",
        "_to_copy",
        "contiguous",
        "clone",
    )
}
_MAY_RETURN_OPERAND = {"aten::dropout", "aten::feature_dropout", "aten::type_as", "aten::to"}
_DROPOUT = {"aten::dropout", "aten::native_dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::bernoulli"}
_PACKED_TYPES = {torch.int8, torch.uint8, torch.int16, torch.int32}
_QUANTIZED_NAMESPACES = {"quantized_decomposed", "torchao", "quantized", "bitsandbytes", "gptqmodel"}
_QUANTIZED_WORDS = (
    "dequantize",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm",
    "_scaled_mm",
    "fake_quantize",
    "qlinear",
)


def _is_active_dropout(node: Node) -> bool:
    bound = arguments(node)
    if op_name(node) in _DROPOUT:
        return float(bound.get("p", 1.0)) > 0.0 and bool(bound.get("train", True))
    return float(bound.get("dropout_p") or 0.0) > 0.0


def _dropout_rate(node: Node) -> Any:
    bound = arguments(node)
    return bound.get("p", bound.get("dropout_p"))


def _is_check(node: Node) -> bool:
    """Assertions have no users and must stay."""
    return "assert" in op_name(node) or "sym_constrain" in op_name(node)


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

"""An exported program run on real tensors, in its own dtypes or lifted to float64 throughout.

Lifted means that no value is ever rounded to less than float64. Constants are upcast where they are used (and released
right after, so that the peak stays near one constant), dtype arguments that name a narrower float name float64 instead,
and the default dtype is float64 for the operators that do not name one. Two programs that are equal as functions of
real numbers then agree to about 1e-15, whatever casts their authors wrote into norms and position embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from spinpass.errors import ConfigError, ProgramError
from spinpass.graph import Handle, is_op, mutates, op_name, trim, values_of
from spinpass.progress import Tick

from .together import Together, is_in_parts

Watch = Callable[[Node, Any], Any]
"""A function that is given every node with its value, and returns the value to go on with."""

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)
_DTYPE_ASSERTION = "aten._assert_tensor_metadata.default"
# A lookup commutes with a cast; to look up first avoids a float64 copy of the whole table.
_LOOKUPS = frozenset({"aten.embedding.default", "aten.index_select.default"})
_LINEAR = "aten.linear.default"
_COPY = "aten.copy.default"
# Neither disabling gradients nor autocast means anything in a float64 run without gradients.
_SCOPES = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
_COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::lift_fresh_copy"})
_NODE_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Deferred:
    """A constant that is computed where a lifted run uses it, and released again."""

    compute: Callable[[], Tensor]


@dataclass(frozen=True)
class Execution:
    """What one run returned.

    Attributes:
        outputs: the flat user outputs.
        state: the new value of every input or buffer that the run changed, in place or through a mutation output of the
            signature, by placeholder name.
    """

    outputs: tuple[Any, ...]
    state: dict[str, Tensor]


def run(ep: ExportedProgram, inputs: object = None, *, float64: bool = False) -> list[Any]:
    """Return the flat user outputs of ``ep`` for ``inputs``: tensors, or the plain value where one is none.

    Args:
        ep: the program.
        inputs: what :func:`flat_inputs` takes. They are not modified.
        float64: lift the program throughout, so that all floating outputs are float64.

    Raises:
        ConfigError: the inputs do not fit the program.
        ProgramError: a node could not be run; the message names it.
    """
    return list(execute(ep, flat_inputs(ep, inputs), float64=float64).outputs)


def flat_inputs(ep: ExportedProgram, inputs: object) -> dict[str, Any]:
    """Return ``inputs`` as {user placeholder name: value}.

    Args:
        ep: the program.
        inputs: such a mapping itself, a mapping of keyword arguments, a sequence of positional arguments, or the pair
            ``(args, kwargs)`` as in ``ExportedProgram.example_inputs``.

    Raises:
        ConfigError: the inputs do not match those of the program.
    """
    names = user_input_names(ep)
    if isinstance(inputs, Mapping) and set(inputs) == set(names):
        return {name: inputs[name] for name in names}
    args, kwargs = _args_kwargs(inputs)
    try:
        values = ep.call_spec.in_spec.flatten_up_to((args, kwargs))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the inputs do not fit the program, which takes {', '.join(names)}: {error}") from error
    return dict(zip(names, values, strict=True))


def _args_kwargs(inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise ConfigError(f"inputs must be a tuple of arguments or a mapping of names, got {type(inputs).__name__}")
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return inputs[0], dict(inputs[1])
    return tuple(inputs), {}


def user_input_names(ep: ExportedProgram) -> list[str]:
    """Return the placeholder names of the user inputs, in the order of the signature."""
    return [spec.arg.name for spec in ep.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def constants(ep: ExportedProgram) -> dict[str, Any]:
    """Return {placeholder name: value} of everything that is not given when the program is called.

    That is parameters, buffers, lifted constants, and user inputs that export specialised to one plain value.

    Raises:
        ProgramError: the program lacks a constant that a placeholder names.
    """
    return {spec.arg.name: _constant(ep, spec) for spec in ep.graph_signature.input_specs if _is_constant(spec)}


def _is_constant(spec: InputSpec) -> bool:
    return spec.kind in _CONSTANTS or isinstance(spec.arg, ConstantArgument)


def _constant(ep: ExportedProgram, spec: InputSpec) -> Any:
    if isinstance(spec.arg, ConstantArgument):
        return spec.arg.value
    store = ep.state_dict if spec.target in ep.state_dict else ep.constants
    if spec.target is None or spec.target not in store:
        raise ProgramError(f"placeholder {spec.arg.name} names the constant {spec.target}, which the program lacks")
    return store[spec.target]


def execute(
    ep: ExportedProgram,
    values: Mapping[str, Any],
    *,
    float64: bool = False,
    tick: Tick | None = None,
    watch: Watch | None = None,
    gradients: bool = False,
) -> Execution:
    """Run ``ep``. Nothing in ``values`` or in the program is modified: what is written in place is cloned first.

    Args:
        ep: the program.
        values: the user inputs by placeholder name. A value for a constant replaces the stored one, and may be
            :class:`Deferred` in a lifted run.
        float64: lift the program throughout.
        tick: called after every node.
        watch: called with every node and its value before ``tick``; it returns the value to go on with.
        gradients: record the gradients of the values that require them.

    Raises:
        ProgramError: a value is missing, a node could not be run, or an output is of a kind that inference has not.
    """
    return execute_each(ep, [values], float64=float64, tick=tick, watch=watch, gradients=gradients)[0]


def execute_each(ep: ExportedProgram, each: Sequence[Mapping[str, Any]], **options: Any) -> list[Execution]:
    """Run ``ep`` as :func:`execute_together`, but raise the first error."""
    found: list[Execution] = []
    for result in execute_together(ep, each, **options):
        if isinstance(result, ProgramError):
            raise result
        found.append(result)
    return found


def execute_together(
    ep: ExportedProgram,
    each: Sequence[Mapping[str, Any]],
    *,
    float64: bool = False,
    tick: Tick | None = None,
    watch: Watch | Sequence[Watch | None] | None = None,
    gradients: bool = False,
) -> list[Execution | ProgramError]:
    """Run ``ep`` on several inputs at once, node by node: a constant is read, folded and lifted once for all of them.

    The arguments are those of :func:`execute`; ``watch`` may be one for each of the inputs. Where a node cannot be run
    on some inputs, their place holds the error, and the others go on.

    Raises:
        ProgramError: a value is missing, or an output is of a kind that inference has not.
    """
    written = _written_placeholders(ep)
    feeds = [_feed(ep, values, written, float64) for values in each]
    together = Together()
    ended: list[Any] = [None] * len(feeds)
    with torch.set_grad_enabled(gradients), _default_dtype(torch.float64 if float64 else torch.get_default_dtype()):
        watches = watch if isinstance(watch, Sequence) else [watch] * len(feeds)
        runners = [Runner(ep.graph_module, float64=float64, tick=tick, watch=w, together=together) for w in watches]
        for runner, feed in zip(runners, feeds, strict=True):
            runner.args_iter = iter(feed)
        for node in ep.graph_module.graph.nodes:
            alive = [r for r, end in zip(runners, ended, strict=True) if not isinstance(end, ProgramError)]
            together.begin(node, alive)
            for i, runner in enumerate(runners):
                if not isinstance(ended[i], ProgramError):
                    try:
                        ended[i] = runner.advance(node)
                    except ProgramError as error:
                        ended[i] = error
                        runner.env.clear()
            if together.end():
                trim()
    return [
        result if isinstance(result, ProgramError) else _split_outputs(ep, result, _changed(ep, feed, written, values))
        for result, feed, values in zip(ended, feeds, each, strict=True)
    ]


def _feed(ep: ExportedProgram, values: Mapping[str, Any], written: set[str], float64: bool) -> list[Any]:
    """Return the arguments of the graph; what the program writes to is a copy."""
    known = constants(ep) | dict(values)
    feed: list[Any] = []
    for spec in ep.graph_signature.input_specs:
        name = spec.arg.name
        if name not in known:
            raise ProgramError(f"no value for input {name} ({spec.kind.name.lower()})")
        value = lift(known[name]) if float64 and name in written else known[name]
        feed.append(value.clone() if name in written and isinstance(value, Tensor) else value)
    return feed


def _changed(ep: ExportedProgram, feed: list[Any], written: set[str], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the arguments that the run has written to and that are not what they were."""
    known = constants(ep) | dict(values)
    after = {spec.arg.name: new for spec, new in zip(ep.graph_signature.input_specs, feed, strict=True)}
    return {
        name: new
        for name, new in after.items()
        if name in written and isinstance(new, Tensor) and not torch.equal(_computed(known[name]).to(new.dtype), new)
    }


def _split_outputs(ep: ExportedProgram, results: Sequence[Any], state: dict[str, Tensor]) -> Execution:
    """Tell the user outputs from the new values of inputs and buffers, which go to ``state``."""
    signature = ep.graph_signature
    buffers = {spec.target: spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.BUFFER}
    outputs: list[Any] = []
    for spec, value in zip(signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(value)
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            state[buffers[spec.target]] = value
        elif spec.kind is OutputKind.USER_INPUT_MUTATION and spec.target is not None:
            state[spec.target] = value
        else:
            raise ProgramError(f"output {spec.arg} of kind {spec.kind.name} is not supported: export for inference")
    return Execution(tuple(map(_computed, outputs)), state)


def lift(value: Any) -> Any:
    """Return a tensor or dtype of a narrower float as float64 (complex128 if it is complex), anything else as it is."""
    value = _computed(value)
    if isinstance(value, Handle):
        return value if value.dtype == torch.float64 else value.lifted()
    if isinstance(value, Tensor):
        wider = _WIDER.get(value.dtype)
        return value if wider is None else value.detach().to(wider)
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, Deferred) else value


def origin(node: Node) -> Node:
    """Return the node whose data ``node`` shows, through views, casts, copies and in-place writes."""
    while node.op == "call_function" and _passes_through(node):
        node = node.all_input_nodes[0]
    return node


def _passes_through(node: Node) -> bool:
    if not node.all_input_nodes:
        return False
    if not is_op(node):
        return op_name(node) == "getitem"
    return node.target.is_view or op_name(node) in _COPIES or mutates(node)  # type: ignore[union-attr]


def _written_placeholders(ep: ExportedProgram) -> set[str]:
    """Return the placeholders that some operator may write in place.

    Too many are harmless: each is cloned before the run.
    """
    found: set[str] = set()
    for node in ep.graph.nodes:
        if mutates(node):
            found.update(root.name for root in map(origin, node.all_input_nodes) if root.op == "placeholder")
    return found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


class Runner(Interpreter):
    """fx's interpreter, which frees every value after its last use; with ``float64`` it lifts as it goes.

    Args:
        module: the graph.
        float64: lift every value.
        tick: called after every node.
        watch: called with every node and its value before ``tick``; it returns the value to go on with.
        together: what this run and others share, node by node.
    """

    def __init__(
        self,
        module: GraphModule,
        *,
        float64: bool,
        tick: Tick | None = None,
        watch: Watch | None = None,
        together: Together | None = None,
    ) -> None:
        super().__init__(module)
        self._together = together
        self.extra_traceback = False
        self.float64 = float64
        self.tick = tick
        self.watch = watch

    def advance(self, node: Node) -> Any:
        """Run one node, keep its value for its readers, and free what nothing reads any more; return the value.

        Raises:
            ProgramError: the node could not be run.
        """
        result = self.env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]
        return result

    def run_node(self, n: Node) -> Any:
        """Run one node, show it to ``watch`` and count it.

        Raises:
            ProgramError: the node could not be run.
        """
        try:
            result = super().run_node(n)
        except _NODE_ERRORS as error:
            where = " lifted to float64" if self.float64 else ""
            raise ProgramError(f"node {n.name} ({n.target}) could not be run{where}: {error}") from error
        if self.watch is not None:
            result = self.watch(n, result)
        if self.tick is not None:
            self.tick()
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator, with lifted arguments in a lifted run."""
        if not self.float64:
            if any(isinstance(value, Handle) for value in args) and str(target) not in _LOOKUPS:
                args = tuple(map(self._read, args))
            return self._called(target, args, kwargs)
        name = str(target)
        if name == _DTYPE_ASSERTION:
            return None
        if name in _LOOKUPS:
            args, kwargs = map_aggregate(args, self._compute), map_aggregate(kwargs, self._compute)
            return lift(super().call_function(target, args, kwargs))
        args, kwargs = map_aggregate(args, self._lift), map_aggregate(kwargs, self._lift)
        if name in _SCOPES:
            body = next(i for i, value in enumerate(args) if isinstance(value, _Body))
            return args[body](*args[body + 1 :])
        return self._called(target, args, kwargs)

    def _called(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._together is not None and str(target) == _LINEAR and not kwargs and is_in_parts(args[1]):
            return self._together.linear(self, *args)
        if str(target) == _COPY and torch.is_grad_enabled():
            return args[0].clone().copy_(args[1])  # the same, with a gradient
        return super().call_function(target, args, kwargs)

    def operand(self, node: Node) -> Any:
        """Return what an operator that reads the value of a node is called with; None where there is none."""
        found = self.env.get(node)
        return self._lift(found) if self.float64 else self._read(found)

    def _lift(self, value: Any) -> Any:
        return _Body(value) if isinstance(value, GraphModule) else self._once(value, lift)

    def _read(self, value: Any) -> Any:
        return self._once(value, values_of) if isinstance(value, Handle) and not value.is_large else value

    def _compute(self, value: Any) -> Any:
        return self._once(value, _computed) if isinstance(value, Deferred) else value

    def _once(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """Return ``make(value)``, computed once for all runs of this node."""
        return make(value) if self._together is None else self._together.once(value, make)


class _Body(torch.nn.Module):
    """The subgraph of a higher-order operator, run lifted."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.runner = Runner(module, float64=True)

    def forward(self, *args: Any) -> Any:
        return self.runner.run(*args, enable_io_processing=False)

"""One program run step by step on the state it returned itself, whatever basis it keeps that state in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import record
from spinpass.errors import ProgramError
from spinpass.record import Carried

from .interpreter import Deferred, Execution, Watch, constants, execute_each, execute_together


@dataclass
class Session:
    """A program run step by step, each time with the state it returned itself.

    Values go in and come out in the basis of the original.

    Attributes:
        ep: the program.
        float64: whether it is run lifted.
        tick: called after every node.
        deferred: constants to compute in place of the stored ones, by placeholder name.
        state: what inputs and buffers hold by now, by placeholder name and in the program's own basis.
        changed: the names of the inputs and buffers that the program has changed itself.
    """

    ep: ExportedProgram
    float64: bool
    tick: Callable[[], None]
    deferred: Mapping[str, Deferred] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        found = record.read(self.ep)
        self.carried_in: Mapping[str, Carried] = found.inputs if found else {}
        self.carried_out: Mapping[int, Carried] = found.outputs if found else {}
        self.known = constants(self.ep)
        self.raw: tuple[Any, ...] = ()
        self.fed: dict[str, Any] = {}

    def step(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Run the program on ``values``, by placeholder name, and return its flat user outputs.

        Where the program has state of its own, that is taken in place of a value.

        Raises:
            ProgramError: the program could not be run.
        """
        result = step_together([self], [values])[0]
        if isinstance(result, ProgramError):
            raise result
        return result

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a step takes, in the program's own basis: its constants in ``deferred``, ``values`` and state."""
        taken = {name: _into(value, self.carried_in.get(name), self.float64) for name, value in values.items()}
        self.fed = taken | self.state
        return {**self.deferred, **self.fed}

    def take(self, result: Execution) -> tuple[Any, ...]:
        """Note what a step has returned and changed; return its flat user outputs."""
        self.raw = result.outputs
        self.state |= result.state
        self.changed |= result.state.keys()
        self.known |= self.fed
        return self.plain_outputs()

    def again(self, watches: Sequence[Watch]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the last step once more with each watch; return the flat user outputs and the state that each run leaves.

        A watch may write to the inputs, which are copies.

        Raises:
            ProgramError: the program could not be run.
        """
        given = [{**self.deferred, **copies(self.fed)} for _ in watches]
        found = []
        for result in execute_each(self.ep, given, float64=self.float64, watch=watches):
            state = {name: self._plain(held, self.carried_in.get(name)) for name, held in result.state.items()}
            found.append((self._in_plain_basis(result.outputs), state))
        return found

    def plain_outputs(self) -> tuple[Any, ...]:
        """Return the flat user outputs of the last step in the basis of the original."""
        return self._in_plain_basis(self.raw)

    def _in_plain_basis(self, outputs: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self._plain(out, self.carried_out.get(i)) for i, out in enumerate(outputs))

    def current(self, name: str) -> Any:
        """Return what the input or buffer called ``name`` holds now, or None if the program has none of that name."""
        return self._plain(self.state.get(name, self.known.get(name)), self.carried_in.get(name))

    def _plain(self, out: Any, carried: Carried | None) -> Any:
        """Return a value in the basis of the original, in the dtype that the program returned."""
        if carried is None or not isinstance(out, Tensor):
            return out
        restored = carried.applied(out, inverse=True)
        return restored if self.float64 else restored.to(out.dtype)

    def feed_back(self, returned: Mapping[int, str]) -> None:
        """Let outputs, by index, be the inputs of these names in the next step, in the program's own basis."""
        self.state |= {name: self.raw[i] for i, name in returned.items()}


def step_together(
    sessions: Sequence[Session], each: Sequence[Mapping[str, Any]], watch: Watch | None = None
) -> list[tuple[Any, ...] | ProgramError]:
    """Let several sessions of one program step at once, each on its own values; see :func:`.execute_together`."""
    first = sessions[0]
    given = [session.given(values) for session, values in zip(sessions, each, strict=True)]
    results = execute_together(first.ep, given, float64=first.float64, tick=first.tick, watch=watch)
    return [
        result if isinstance(result, ProgramError) else session.take(result)
        for session, result in zip(sessions, results, strict=True)
    ]


def copies(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of which the tensors are copies."""
    return {name: held.clone() if isinstance(held, Tensor) else held for name, held in values.items()}


def _into(given: Any, carried: Carried | None, float64: bool) -> Any:
    if carried is None or not isinstance(given, Tensor):
        return given
    rotated = into_basis(given, carried)
    return rotated if float64 else rotated.to(given.dtype)


def into_basis(x: Tensor, carried: Carried) -> Tensor:
    """Return a cache tensor of the original as the rotated program takes it: the same shape, in float64."""
    return carried.applied(x)

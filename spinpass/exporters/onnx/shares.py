"""External data that the ranks of a team write together:  every tensor in pieces, and of all bytes each rank its part.

    rank 0:  the graph, and the data with holes  ->  where each tensor begins  ->  every rank fills its own part

The bytes are those that one process writes: what a piece is does not depend on how many ranks there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from spinpass.workers import Team

from .streamed import Piece, pieces_of


class _Share(ir.LazyTensor):
    """The tensor of an initializer of which this rank writes some pieces, and leaves room for the others."""

    def __init__(self, held: ir.TensorProtocol, pieces: list[tuple[bool, Piece]]) -> None:
        super().__init__(lambda: held, held.dtype, held.shape, name=held.name)  # type: ignore[arg-type]
        self._pieces = pieces

    def tofile(self, file: Any) -> None:
        """Write the pieces that are this rank's; the file ends up behind the last."""
        for own, piece in self._pieces:
            if own:
                piece.write(file)
            else:
                file.seek(piece.size, os.SEEK_CUR)


def save_shared(model: ir.Model, path: Path, data: str | None, team: Team) -> None:
    """Write a model, with its weights in the file ``data`` beside it unless that is None. Rank 0 calls this, and the
    others :func:`help_save`."""
    if data is None or team.size == 1:
        team.told(None)
        ir.save(model, path, external_data=data)
        return
    starts: dict[int, int] = {}
    with _shared_out(model, team) as held:
        at = {id(tensor): k for k, tensor in enumerate(held)}

        def started(tensor: ir.TensorProtocol, about: Any) -> None:
            starts[at[id(tensor)]] = about.offset

        ir.save(model, path, external_data=data, callback=started)
        file = path.with_name(data)
        end = max((start + held[k].nbytes for k, start in starts.items()), default=0)
        os.truncate(file, end)  # behind the last piece, which may be another's
        team.told({"file": str(file), "starts": sorted(starts.items())})
        team.gathered(None)


def help_save(model: Callable[[], ir.Model], team: Team) -> None:
    """Write this rank's part of what rank 0 saves. The model is that of rank 0, made while rank 0 makes its own; where
    that goes into one file nothing is written here."""
    made = model()
    told = team.told(None)
    if told is None:
        return
    with _shared_out(made, team) as held, Path(told["file"]).open("r+b") as file:
        for k, start in told["starts"]:
            file.seek(start)
            held[k].tofile(file)
        file.flush()
        os.fsync(file.fileno())
    team.gathered(None)


@contextmanager
def _shared_out(model: ir.Model, team: Team) -> Iterator[list[_Share]]:
    """Let each initializer write this rank's pieces alone, and yield the tensors in their order."""
    values = [v for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    before = [v.const_value for v in values]
    pieces = [pieces_of(tensor) for tensor in before if tensor is not None]
    total, passed = max(1, sum(piece.size for each in pieces for piece in each)), 0
    made: list[_Share] = []
    try:
        for value, tensor, each in zip(values, before, pieces, strict=True):
            assert tensor is not None
            owned: list[tuple[bool, Piece]] = []
            for piece in each:
                owned.append((passed * team.size // total == team.rank, piece))
                passed += piece.size
            made.append(_Share(tensor, owned))
            value.const_value = made[-1]
        yield made
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor

"""A team whose ranks are threads of this process, of which one runs at a time: for what is dealt out, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinpass.workers import Team

_T = TypeVar("_T")


class _Table:
    def __init__(self, size: int) -> None:
        self.size, self.turn, self.all_here = size, threading.Lock(), threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class ThreadRank(Team):
    def __init__(self, table: _Table, rank: int) -> None:
        self.rank, self.size, self.table = rank, table.size, table

    def _wait(self) -> None:
        self.table.turn.release()
        try:
            self.table.all_here.wait()
        finally:
            self.table.turn.acquire()

    def gathered(self, value: _T) -> list[_T]:
        self.table.values[self.rank] = value
        self._wait()
        found = list(self.table.values)
        self._wait()
        return found

    def told(self, value: Any) -> Any:
        return self.gathered(value)[0]

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gathered(tensor.clone())).sum(0).to(tensor.dtype)

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        given = self.gathered(tensor.clone())
        assert all(each.shape == tensor.shape and each.dtype == tensor.dtype for each in given)
        return given[rank].clone()


def by_ranks(size: int, act: Callable[[Team], _T]) -> list[_T]:
    """What each rank returns."""
    table = _Table(size)

    def as_rank(rank: int) -> _T:
        with table.turn:
            try:
                return act(ThreadRank(table, rank))
            except BaseException:
                table.all_here.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(as_rank, rank) for rank in range(size)]
        errors = [error for each in running if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in running]

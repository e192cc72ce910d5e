"""Several processes that make one thing together; a process by itself is a team of one.

    torchrun --nproc-per-node N -m spinpass export …   ->   ranks 0 … N−1, by torch.distributed

What is dealt out, and what is made of the shares, is the business of whoever has a :class:`Team`; here is how its ranks
speak with each other. Tensors go by torch.distributed's collectives, small values and signs of life by its store. No
call blocks for ever: a rank that dies, or fails, ends all others with an error that names it.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stub does not say that it is public
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from spinpass import errors
from spinpass.errors import SpinpassError, WorkerError, first_line

_T = TypeVar("_T")
_BEAT = 0.5  # seconds between two signs of life
_SILENT = 120.0  # seconds without one until a rank is lost: a long call may hold Python's lock
_MISSED = 4.0  # seconds likewise where something says that one is: a connection that has broken, a launcher that ends
_JOINING = 300.0  # seconds for all ranks to come
_LEAVING = 20.0  # seconds for all ranks to end, so that a launcher does not end the one that says why
_EVER = timedelta(days=365)  # of a collective: how long one may take is for the signs of life to say
_FAILED = "failed"
_AGAIN = "run the same command again: it goes on from what was kept"


class Team:
    """The ranks that share a piece of work. This one is a process by itself.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes, proves and publishes."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this is the first rank that is not lost, which says what there is to say."""
        return True

    def dealt(self, items: Sequence[_T]) -> list[_T]:
        """Return this rank's share: every ``size``-th item."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks of a tensor, which has one shape and dtype; the tensor may be overwritten."""
        return tensor

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the tensor that a rank has. The others give one of its shape and dtype, which is overwritten."""
        del rank
        return tensor

    def told(self, value: Any) -> Any:
        """Return what rank 0 has given, which JSON can hold; what the others give does not matter."""
        return value

    def gathered(self, value: _T) -> list[_T]:
        """Return what each rank has given, which JSON can hold, by rank. No rank goes on before all have come here."""
        return [value]

    def made(self, make: Callable[[], _T]) -> list[_T]:
        """Return what each rank makes, as :meth:`gathered`. Where a rank raises an error of spinpass, all raise that of
        the first such rank, and may go on together."""
        own: SpinpassError | None = None
        try:
            said: dict[str, Any] = {"made": make()}
        except SpinpassError as error:
            own, said = error, {"failed": [_kind_of(error), str(error)]}
        every = self.gathered(said)
        for rank, each in enumerate(every):
            if "failed" in each:
                raise own if own is not None and rank == self.rank else _error_of(rank, self.size, *each["failed"])
        return [each["made"] for each in every]

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Let an error of one rank be that of all.

        Raises WorkerError: another rank was lost, or failed with an error that is none of spinpass. What spinpass
        raises is raised on each rank alike.
        """
        yield


def launched() -> tuple[int, int]:
    """Return the rank of this process and how many there are, as torchrun says; (0, 1) without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("RANK", "0")) if size > 1 else 0, size


@contextmanager
def joined_team() -> Iterator[Team]:
    """Yield the team of the processes that torchrun has started; a team of one without it.

    Leaving waits some seconds for the other ranks. Raises WorkerError where one does not come.
    """
    if launched()[1] == 1:
        yield Team()
        return
    team = _Ranks(*_store())
    try:
        _take_own_device()
        with team.as_one():  # a launcher may end it meanwhile
            team.join()
        yield team
    except (Exception, KeyboardInterrupt) as error:
        team.fail(error)
        raise
    finally:
        team.leave()


def _take_own_device() -> None:
    """Let ``cuda`` without a number be another device in each rank of a machine, as torchrun counts them."""
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and place < torch.cuda.device_count():
        torch.cuda.set_device(place)


def _store() -> tuple[Store, int, int]:
    rank, size = launched()
    try:
        found: tuple[Store, int, int] = next(rendezvous("env://", timeout=timedelta(seconds=_JOINING)))
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"rank {rank} of {size} does not reach the others: {first_line(error)}") from error
    return found


def _connected(store: Store) -> Store:
    """Return another connection to a store: on one of its own no thread waits for another."""
    if not isinstance(store, TCPStore):
        return store
    made: Store = TCPStore(store.host, store.port, is_master=False, timeout=_EVER, wait_for_workers=False)
    return made


class _Stopped(BaseException):
    """This rank is to end; why is asked of the watch. It passes by whoever handles errors."""


def _interrupt() -> None:
    """Let the main thread handle SIGTERM, also in the middle of a system call."""
    if hasattr(signal, "pthread_kill") and threading.main_thread().ident is not None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # type: ignore[arg-type]
    else:
        _thread.interrupt_main(signal.SIGTERM)


class _Watch(threading.Thread):
    """Gives signs of life of this rank, and looks for those of the others.

    Attributes:
        broken: why the team cannot go on; None while it can.
        lost: the ranks that give no sign of life.
    """

    def __init__(self, store: Store, rank: int, size: int, interrupts: bool) -> None:
        super().__init__(name="spinpass-watch", daemon=True)
        self._interrupts = interrupts  # the main thread, which does the work
        self.broken: SpinpassError | None = None
        self.lost: set[int] = set()
        self._store, self._rank, self._size = store, rank, size
        self._others = [other for other in range(size) if other != rank]
        self._seen = {other: (b"", time.monotonic()) for other in self._others}
        self._done = threading.Event()

    def run(self) -> None:
        """Watch until this rank leaves, or the team is broken."""
        count = 0
        while not self._done.wait(_BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                self.broken = self.look(_SILENT)
            except Exception as error:  # where the store is, a rank or the launcher was
                self.broken = self._lost(0, f"its store is gone: {first_line(error)}")
            if self.broken is not None:
                if self._interrupts and not self._done.is_set():
                    _interrupt()
                return

    def look(self, patience: float) -> SpinpassError | None:
        """Return the error of a rank that failed, or was silent for so many seconds; None where there is none."""
        if self._store.check([_FAILED]):
            said = json.loads(self._store.get(_FAILED))
            return _error_of(said["rank"], self._size, said["type"], said["message"])
        now = time.monotonic()
        for other in self._others:
            beat = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
            if beat != self._seen[other][0]:
                self._seen[other] = beat, now
            elif now - self._seen[other][1] > patience:
                return self._lost(other, f"no sign of it for {patience:.0f} s")
        return None

    def why(self) -> SpinpassError | None:
        """Return why the team is broken, where something says that it is; None where all ranks are well."""
        deadline = time.monotonic() + 2 * _MISSED
        while self.broken is None and time.monotonic() < deadline:
            with suppress(Exception):
                self.broken = self.look(_MISSED)
            time.sleep(_BEAT / 4)
        return self.broken

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def _lost(self, rank: int, how: str) -> WorkerError:
        self.lost.add(rank)
        return WorkerError(f"rank {rank} of {self._size} was lost ({how}): {_AGAIN}")


def _kind_of(error: BaseException) -> str:
    """Return the name of an error's class, of the nearest public one where it is of spinpass."""
    public = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(public, type(error).__name__)


def _error_of(rank: int, size: int, kind: str, message: str) -> SpinpassError:
    """Return the error that a rank has ended with."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, SpinpassError):
        return found(message)
    return WorkerError(f"rank {rank} of {size} failed, unexpected {kind}: {message}")


class _Ranks(Team):
    """A team of several processes."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._exchanges = 0
        self._stopped = False
        self._main = threading.current_thread() is threading.main_thread()
        self._watch = _Watch(PrefixStore("watch", _connected(store)), rank, size, self._main)
        self._words = PrefixStore("words", store)
        self._before = signal.signal(signal.SIGTERM, self._stop) if self._main else None

    def join(self) -> None:
        """Wait for all ranks, and connect to them. Raises WorkerError where one does not come."""
        self._come()
        self._watch.start()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        group = PrefixStore("group", self._store)
        try:
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=_EVER)
        except (RuntimeError, ValueError) as error:
            raise self._watch.why() or WorkerError(f"the ranks do not connect: {first_line(error)}") from error

    @property
    def speaks(self) -> bool:
        """See :attr:`Team.speaks`."""
        return all(other in self._watch.lost for other in range(self.rank))

    def sum(self, tensor: Tensor) -> Tensor:
        """See :meth:`Team.sum`."""
        whole = tensor.contiguous()
        self._awaited(lambda: dist.all_reduce(whole, async_op=True))
        return whole

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """See :meth:`Team.broadcast`."""
        whole = tensor.contiguous()
        self._awaited(lambda: dist.broadcast(whole, rank, async_op=True))
        return whole

    def told(self, value: Any) -> Any:
        """See :meth:`Team.told`."""
        self._exchanges += 1
        key = str(self._exchanges)
        if self.leads:
            self._say(key, value)
        return self._word(key)

    def gathered(self, value: _T) -> list[_T]:
        """See :meth:`Team.gathered`."""
        self._exchanges += 1
        self._say(f"{self._exchanges}/{self.rank}", value)
        return [self._word(f"{self._exchanges}/{other}") for other in range(self.size)]

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """See :meth:`Team.as_one`."""
        try:
            yield
        except _Stopped as stop:
            found = self._watch.why()
            if found is None:
                raise WorkerError(f"rank {self.rank} of {self.size} was told to end: {_AGAIN}") from stop
            raise found from None
        except Exception as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Let all ranks end with this error, unless they do with another."""
        said = {"rank": self.rank, "type": _kind_of(error), "message": str(error)}
        with suppress(Exception):  # the store may be what has failed
            PrefixStore("watch", self._store).compare_set(_FAILED, "", json.dumps(said))

    def leave(self) -> None:
        """Give up the watch, and wait some seconds for the others, so that none is ended before it has said why."""
        self._stopped = True  # nothing is left to be stopped
        self._watch.stop()
        with suppress(Exception):  # who has the store may have left
            self._words.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + _LEAVING
            came = [other for other in range(self.size) if self._words.check([f"here/{other}"])]
            here = [f"left/{other}" for other in came if other not in self._watch.lost]
            while time.monotonic() < deadline and not all(self._words.check([each]) for each in here):
                time.sleep(_BEAT / 10)
        if self._main:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        if dist.is_initialized():
            with suppress(Exception):
                dist.destroy_process_group()

    def _come(self) -> None:
        """Wait for all ranks."""
        self._say(f"here/{self.rank}", None)
        deadline = time.monotonic() + _JOINING
        for other in range(self.size):
            while not self._checked(f"here/{other}"):
                if time.monotonic() > deadline:
                    raise WorkerError(f"rank {other} of {self.size} did not come within {_JOINING:.0f} s: start it")
                time.sleep(_BEAT / 10)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, of the launcher or of the watch: once."""
        del signum, frame
        if not self._stopped:
            self._stopped = True
            raise _Stopped

    def _say(self, key: str, value: Any) -> None:
        with self._reached():
            self._words.set(key, json.dumps(value))

    def _word(self, key: str) -> Any:
        """Return what was said under a key, as soon as it is."""
        wait = 0.001
        while not self._checked(key):
            time.sleep(wait)
            wait = min(1.5 * wait, 0.05)
        with self._reached():  # between the two the rank that has the store may be lost
            return json.loads(self._words.get(key))

    def _checked(self, key: str) -> bool:
        self._check_whole()
        with self._reached():
            return bool(self._words.check([key]))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raise what is known of the team where the store cannot be spoken to."""
        try:
            yield
        except Exception as error:
            raise self._watch.why() or WorkerError(f"the ranks' store is gone: {first_line(error)}") from error

    def _check_whole(self) -> None:
        """Raise the error of another rank, where no signal has."""
        if self._watch.broken is not None and not self._main:
            raise self._watch.broken

    def _awaited(self, begin: Any) -> None:
        """Do a collective; in between, the watch may end it."""
        try:
            work, wait = begin(), 0.0005
            while not work.is_completed():
                self._check_whole()
                time.sleep(wait)
                wait = min(1.5 * wait, 0.02)
            work.wait()
        except SpinpassError:
            raise
        except Exception as error:  # gloo and NCCL raise RuntimeError and what derives from it
            raise self._watch.why() or WorkerError(f"the ranks lost each other: {first_line(error)}") from error

"""``spinpass chat``: a conversation with an exported folder, turn by turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from spinpass.errors import ConfigError
from spinpass.runtime import CPU, Conversation, Sampling, check_template, open_decoder

from .decoders import (
    GREEDY,
    Exported,
    Provider,
    Stop,
    Threads,
    beside_model,
    check_stops,
    sampling_options,
)
from .options import AsJson, Verbose
from .screen import screen_of

_CLEAR, _END = ("/clear", "/new"), ("/exit", "/quit")


@sampling_options
def chat_command(
    ctx: typer.Context,
    folder: Exported,
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    sampling: Sampling = GREEDY,
    stop: Stop = None,
    threads: Threads = None,
    provider: Provider = CPU,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Talk to a model in ONNX Runtime, OpenVINO or ExecuTorch.

    A line is a turn, and the cache keeps what has been said. Ctrl-C stops an
    answer, and at the prompt ends the program, as /exit does; /clear begins
    anew. Lines may come from a pipe. No file is written. The likeliest token is
    taken unless --temperature asks for draws.

    Example: spinpass chat out
    """
    screen = screen_of(ctx, as_json, verbose)
    stops = check_stops(stop)
    check_template(beside_model(folder, threads).tokenizer, str(folder))  # before the model is loaded
    decoder = open_decoder(folder, provider=provider, threads=threads)
    talk = Conversation(decoder, system=system, sampling=sampling, max_new_tokens=max_new_tokens, stop=stops)
    told: list[dict[str, Any]] = []
    for line in _lines(interactive=sys.stdin.isatty() and not as_json):
        if line in _END:
            break
        if line in _CLEAR:
            talk.clear()
            continue
        answer: list[str] = []
        try:
            with _stopped_by_ctrl_c() as stopped:
                for piece in talk.answer(line, lambda: bool(stopped)):
                    answer.append(piece)
                    screen.piece(piece)
        except ConfigError as error:  # it has grown too long, or is no text
            screen.note(f"{error}; /clear begins anew" if talk.turns else str(error))
            told.append({"user": line, "error": str(error)})
            continue
        screen.piece("\n")
        told.append({"user": line, "answer": "".join(answer), "tokens_in_cache": talk.read})
    if as_json:
        screen.document({"ok": True, "folder": str(folder), "turns": told})


def _lines(*, interactive: bool) -> Iterator[str]:
    """The lines that are typed, or piped, without those that are empty."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[list[int]]:
    """A list that is filled when Ctrl-C is pressed, which then does no more than that."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)

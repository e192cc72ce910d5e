"""``spinpass chat``: a conversation with an exported folder, turn by turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path
from spinpass.runtime import ModelFolder, Sampling, check_template

from .options import AsJson, Verbose
from .screen import screen_of

_CLEAR, _END = ("/clear", "/new"), ("/exit", "/quit")


def chat_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that spinpass export wrote.")],
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Temperature to draw at; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that have this share of the probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of ONNX Runtime, which chooses by itself by default.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Talk to a model in ONNX Runtime: a line is a turn, and the cache keeps what has been said.

    Ctrl-C stops an answer, and at the prompt ends the program, as /exit does;
    /clear begins anew. Lines may come from a pipe. No file is written.

    Example: spinpass chat out
    """
    screen = screen_of(ctx, as_json, verbose)
    if not model_path(folder).is_file():
        raise ConfigError(f"there is no model at {folder}: name a folder that spinpass export wrote")
    check_template(ModelFolder(model_path(folder).parent).tokenizer, str(folder))  # before the model is loaded
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: choose 1 or more, or leave it out")
    try:
        from spinpass.runtime import Conversation, OrtDecoder

        decoder = OrtDecoder(folder, threads=threads)
    except ModuleNotFoundError as error:
        raise ExportError(f"running ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    sampling = Sampling(temperature, 0, top_p, seed)
    talk = Conversation(decoder, system=system, sampling=sampling, max_new_tokens=max_new_tokens)
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
        except ConfigError as error:  # it has grown too long
            screen.note(f"{error}; /clear begins anew")
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

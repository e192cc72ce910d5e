"""A type the way a user goes: its tiny model is saved, exported as a folder, opened, and generates past every window.

Of every step of a text the logits are compared with those of transformers' own model, which reads the same tokens with
its own cache. One text begins below the windows and passes them token by token, another begins beyond them, and the
last beyond the chunks of 64 tokens in which some layers read.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import SpinpassError
from spinpass.folders import export
from spinpass.progress import Silent
from spinpass.runtime import OrtModel

from . import states
from .export import first_line
from .models import VOCABULARY, build, set_cache

TEXTS = ((1, 5, 26), (2, 24, 6), (1, 70, 4))  # rows, tokens of the prompt, new tokens
LONGEST_WINDOW = 24
"""All windows of the tiny configurations are shorter than this and longer than the first prompt."""
_TIE = 1e-3  # of the largest logit: how far two logits may be apart
_EARLY = ("", "load", "export", "compare", "plan")  # the steps in which a refusal costs nothing
_LONGEST = 600

Begin = Callable[[str], None]  # told the name of every step


class NotSaved(Exception):
    """The tiny model could not be built or saved."""


class _Told(Silent):
    """The steps of an export, each told as it begins."""

    def __init__(self, begin: Begin) -> None:
        super().__init__()
        self.last, self._begin = "", begin

    def start(self, name: str, /, unit: str = "") -> Callable[[int, int], None]:
        self.last = name
        self._begin(name)
        return super().start(name, unit)


def measure(arch: str, place: Path, begin: Begin) -> dict[str, Any]:
    """Export the type into the empty folder ``place`` and let the result generate.

    ``written``, ``opens`` and ``generates`` say how far it came, ``left`` what a failed export left on the disk.
    Raises NotSaved; never raises for what the product does.
    """
    model, out = place / "model", place / "out" / "folder"
    _save(arch, model)
    out.parent.mkdir()
    steps = _Told(begin)
    try:
        export(model, out, steps=steps, bits=16)
    except Exception as error:  # the very thing that is measured
        left = sorted(path.name for path in out.parent.iterdir())
        return _failed(error, steps.last) | {"left": left}
    begin("open")
    try:
        opened = OrtModel.from_pretrained(out, threads=1, generation_config={})
    except Exception as error:  # see above
        return {"written": True, **_broken(error), "status": states.WRITTEN}
    begin("generate")
    try:
        found = _generated(opened, model)
    except Exception as error:  # see above
        return {"written": True, "opens": True, **_broken(error), "status": states.OPENS}
    wrong = found["wrong_tokens"] or not found["error"] <= _TIE
    why = f"{found['wrong_tokens']} tokens are not transformers' own, logits differ by {found['error']:.1e}"
    outcome = {"status": states.OPENS, "why": why} if wrong else {"status": states.GENERATES}
    return {"written": True, "opens": True, "generates": not wrong, **found, **outcome}


def _save(arch: str, folder: Path) -> None:
    try:
        model: Any = build(arch)[0]
        set_cache(model, True)
        model.save_pretrained(folder)
    except Exception as error:  # a model's constructor raises what it likes
        raise NotSaved(first_line(error)) from error


def _failed(error: Exception, step: str) -> dict[str, Any]:
    if not isinstance(error, SpinpassError):
        return {**_broken(error), "status": states.UNTYPED, "at": step}
    status = states.REFUSED if step in _EARLY else states.LATE
    return {"status": status, "why": f"{type(error).__name__}: {error}"[:_LONGEST], "at": step}


def _broken(error: Exception) -> dict[str, Any]:
    return {"why": first_line(error), "traceback": "".join(traceback.format_exception(error))[-2000:]}


def _generated(opened: OrtModel, folder: Path) -> dict[str, Any]:
    """How both texts go on, held against transformers."""
    judges, wrong, worst = ["cache"], 0, 0.0
    for rows, length, new in TEXTS:
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        text = opened.generate(prompt, max_new_tokens=new, eos_token_id=[])
        ours = _logits(opened, text, length)
        apart, passed = _apart(ours, text[:, length:], _cached(folder, text, length))
        for judge, answer in _OTHER_ANSWERS.items() if not bool((apart.maximum(passed) <= _TIE).all()) else ():
            with suppress(Exception):  # not every model runs so
                other = _apart(ours, text[:, length:], answer(folder, text, length))
                apart, passed = apart.minimum(other[0]), passed.minimum(other[1])
                judges.append(judge)
        wrong, worst = wrong + int((passed > _TIE).sum()), max(worst, float(apart.max()))
    return {"wrong_tokens": wrong, "error": worst, "judges": sorted(set(judges))}


def _apart(ours: Tensor, tokens: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Of every step, relative to the largest logit: the largest difference of a logit, and by how much the token that
    was chosen is not transformers' own."""
    scale = theirs.abs().max()
    chosen = theirs.gather(-1, tokens[..., None])[..., 0]
    return (ours - theirs).abs().amax(-1) / scale, (theirs.amax(-1) - chosen) / scale


def _logits(opened: OrtModel, text: Tensor, length: int) -> Tensor:
    """The logits that every token of ``text`` after the prompt was chosen by, (batch, new, vocabulary)."""
    state = opened.graph.start(len(text))
    found = [opened.graph.step(text[:, :length], state)[:, -1]]
    found += [opened.graph.step(text[:, at : at + 1], state)[:, -1] for at in range(length, text.shape[1] - 1)]
    return torch.stack(found, 1)


def _cached(folder: Path, text: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of transformers' model with its cache, which is made to choose the tokens of ``text``."""
    import transformers

    def chosen(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, text[:, ids.shape[1], None], 0.0)

    made = _model(folder).to(dtype).generate(
        text[:, :length], attention_mask=torch.ones_like(text[:, :length]), max_new_tokens=text.shape[1] - length,
        logits_processor=transformers.LogitsProcessorList([chosen]), do_sample=False, eos_token_id=-1, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    found: Tensor = torch.stack(made.logits, 1).float()
    return found


def _at_once(folder: Path, text: Tensor, length: int) -> Tensor:
    """The same of transformers' model that reads the whole text, without a cache."""
    with torch.no_grad():
        logits: Tensor = _model(folder)(text, attention_mask=torch.ones_like(text), use_cache=False).logits
    return logits[:, length - 1 : -1].float()


def _in_float64(folder: Path, text: Tensor, length: int) -> Tensor:
    """The same with its cache, in float64: where the choice of an expert or of a key is a toss, float32 is no judge."""
    return _cached(folder, text, length, torch.float64)


def _model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


_OTHER_ANSWERS = {"at once": _at_once, "float64": _in_float64}
"""Of transformers too, asked where the first is another: some models contradict themselves."""

"""What ``llama_cpp.py`` starts in the environment that has llama-cpp-python: a request per line, an answer per line.

A request is ``{"task": name, ...arguments}``; the answer to a task is what its function returns. The first line says
which version answers, or why none can. Nothing of spinpass is imported.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp prints where it likes

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        import llama_cpp
    except ImportError as error:
        say({"error": str(error)})
        return
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    kernels = llama_cpp.llama_print_system_info().decode()
    say({"version": llama_cpp.__version__, "kernels": kernels})
    for line in sys.stdin:
        request = json.loads(line)
        say(TASKS[request.pop("task")](**request))


def requantize(source: str, target: str, kind: str) -> str:
    """Write a GGUF file with weights of another kind, made of the float values that the source's stand for."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize, options.nthread = True, 1
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    if failed or not Path(target).is_file():
        raise SystemExit(f"llama.cpp cannot make {kind} of {source}")
    return target


def time_round(gguf: str, ids: list[int], prompt: int, threads: int, all_logits: bool) -> dict[str, float]:
    """Load the file and time it: seconds of the prompt, and the median of one token on top over the rest of ``ids``."""
    clock = time.process_time if threads == 1 else time.perf_counter
    model = loaded(gguf, len(ids), threads, all_logits)
    found: dict[str, float] = {}
    for _ in ("to warm up", "to measure"):
        model.reset()
        found["prefill"] = seconds(model, ids[:prompt], clock)
    if not all_logits:  # a single token has the logits of all its positions anyhow
        found["decode"] = statistics.median(seconds(model, [token], clock) for token in ids[prompt:])
    model.close()
    return found


def losses(gguf: str, windows: list[list[int]], threads: int) -> list[float]:
    """Average the negative log-likelihood of every token but the first, per window, from an empty cache."""
    import numpy as np

    model = loaded(gguf, max(map(len, windows)), threads, True)
    found = []
    for ids in windows:
        model.reset()
        model.eval(ids)
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        peak = logits.max(axis=1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        found.append(float((total - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
    model.close()
    return found


def logits(gguf: str, ids: list[int], target: str, threads: int) -> str:
    """Write the logits of every position, from an empty cache, as a NumPy file of float32 (length, vocabulary)."""
    import numpy as np

    model = loaded(gguf, len(ids), threads, True)
    model.eval(ids)
    np.save(target, model.scores[: len(ids)].astype(np.float32))
    model.close()
    return target


def loaded(gguf: str, length: int, threads: int, all_logits: bool) -> Any:
    import llama_cpp

    count = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": length, "n_batch": length, "n_ubatch": length}
    return llama_cpp.Llama(gguf, **count, logits_all=all_logits, verbose=False)


def seconds(model: Any, ids: list[int], clock: Any) -> float:
    began = clock()
    model.eval(ids)
    return float(clock() - began)


TASKS = {"requantize": requantize, "time": time_round, "losses": losses, "logits": logits}

if __name__ == "__main__":
    main()

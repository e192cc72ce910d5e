"""An exported folder in optimum's ``ORTModelForCausalLM``: are its tokens those of transformers?

    python benchmarks/consumers/optimum_onnx.py FOLDER EXPECTED.json

optimum-onnx needs transformers 4, so this runs in an environment of its own (constraints-consumer.txt) and imports
nothing of spinpass. EXPECTED.json is what ``expected.py`` writes. Exits with 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("expected", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder)
    model = ORTModelForCausalLM.from_pretrained(given.folder)
    expected = json.loads(given.expected.read_text(encoding="utf-8"))
    same = [compare(model, tokenizer, answer) for answer in expected]
    print(
        f"transformers {transformers.__version__}: {sum(same)} of {len(same)} answers are those of the original model"
    )
    sys.exit(not all(same))


def compare(model: Any, tokenizer: Any, answer: dict[str, Any]) -> bool:
    """Print how far the greedy tokens of one prompt agree, and whether the tokenizer reads the prompt alike."""
    chat = [{"role": "user", "content": answer["prompt"]}]
    ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    given = torch.tensor([answer["ids"]])
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=len(answer["tokens"]),
            do_sample=False,
        )
    rate = len(answer["tokens"]) / (time.perf_counter() - began)
    tokens = out[0, given.shape[1] :].tolist()
    agreed = sum(a == b for a, b in zip(tokens, answer["tokens"]))
    read = "" if ids == answer["ids"] else "; the tokenizer reads the prompt otherwise"
    print(f"{agreed} of {len(answer['tokens'])} tokens equal, {rate:.1f} tokens/s{read}: {answer['prompt']}")
    return tokens == answer["tokens"] and not read


if __name__ == "__main__":
    main()

"""What transformers answers to the demo's prompts, for the consumers beside this file to compare with.

    python -m benchmarks.consumers.expected OUT.json

The tokens are greedy ones of the original model in float32, the model of the demo unless --model names another one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinpass.folders import ANSWER_TOKENS, PROMPTS, packaged_model
from spinpass.loading import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="", help="a model folder, a name on the hub, a GGUF file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = original_model(given.model or packaged_model())
    answers = [answer(model, tokenizer, prompt) for prompt in PROMPTS]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(answers, indent=2), encoding="utf-8")
    print(f"{given.out}: {len(answers)} prompts, {sum(len(a['tokens']) for a in answers)} tokens")


def original_model(name: str) -> tuple[Any, Any]:
    """Load the model of a folder, a name on the hub or a GGUF file as transformers does, and its tokenizer."""
    source = locate(name)
    where: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **where).eval()
    if source.gguf:  # dequantized as it is, it can be exported
        model.hf_quantizer = None
    return model, AutoTokenizer.from_pretrained(source.location, **where)


def answer(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """Generate: returns the prompt, its token ids in the model's chat format, and the new tokens up to an end token."""
    chat = [{"role": "user", "content": prompt}]
    ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return {"prompt": prompt, "ids": ids, "tokens": out[0, len(ids) :].tolist()}


if __name__ == "__main__":
    main()

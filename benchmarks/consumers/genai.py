"""An exported folder in ONNX Runtime GenAI: are its tokens those of transformers?

    python benchmarks/consumers/genai.py FOLDER EXPECTED.json

EXPECTED.json is what ``expected.py`` writes. Exits with 1 where a token differs, with 0 and a reason without GenAI.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import onnxruntime_genai as og
except ImportError as error:
    print(f"skipped: {error}; pip install onnxruntime-genai")
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("expected", type=Path)
    given = parser.parse_args()
    model = og.Model(str(given.folder))
    tokenizer = og.Tokenizer(model)
    expected = json.loads(given.expected.read_text(encoding="utf-8"))
    ends = set(tokenizer.eos_token_ids)
    same = [compare(model, tokenizer, ends, answer) for answer in expected]
    print(f"GenAI {og.__version__}: {sum(same)} of {len(same)} answers are those of the original model")
    sys.exit(not all(same))


def compare(model: Any, tokenizer: Any, ends: set[int], answer: dict[str, Any]) -> bool:
    """Print how far the greedy tokens of one prompt agree, and whether the tokenizer reads the prompt alike.

    GenAI stops at an end token and leaves it out of what it returns.
    """
    expected = answer["tokens"][:-1] if answer["tokens"][-1] in ends else answer["tokens"]
    chat = json.dumps([{"role": "user", "content": answer["prompt"]}])
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True)).tolist()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(answer["ids"]) + len(answer["tokens"]), do_sample=False)
    generator = og.Generator(model, parameters)
    began = time.perf_counter()
    generator.append_tokens(answer["ids"])
    while not generator.is_done():
        generator.generate_next_token()
    rate = len(answer["tokens"]) / (time.perf_counter() - began)
    tokens = generator.get_sequence(0)[len(answer["ids"]) :].tolist()
    agreed = sum(a == b for a, b in zip(tokens, expected))
    read = "" if ids == answer["ids"] else "; the tokenizer reads the prompt otherwise"
    print(f"{agreed} of {len(expected)} tokens equal, {rate:.1f} tokens/s{read}: {answer['prompt']}")
    return tokens == expected and not read


if __name__ == "__main__":
    main()

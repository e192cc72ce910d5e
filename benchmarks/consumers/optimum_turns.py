"""Texts continued by optimum's ``ORTModelForCausalLM``:  python benchmarks/consumers/optimum_turns.py FOLDER CASES.json

CASES.json holds ``new``, how many tokens follow each turn, and ``cases``: by name, by turn, the tokens of every row.
Shorter rows are padded in front, with a mask. Prints a JSON document: by case, all tokens of every row. It runs in an
environment of its own (constraints-consumer.txt) and imports nothing of spinpass.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    folder, cases = sys.argv[1:]
    given = json.loads(Path(cases).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    model = ORTModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # past end tokens
    found = {name: continued(model, turns, given["new"]) for name, turns in given["cases"].items()}
    print(json.dumps(found))


def continued(model: Any, turns: list[list[list[int]]], new: int) -> list[list[int]]:
    """Read the first turn, generate, append the next one, and so on."""
    rows: list[list[int]] = [[] for _ in turns[0]]
    for turn in turns:
        rows = [[*row, *more] for row, more in zip(rows, turn)]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        rows = [[*row, *line[longest:].tolist()] for row, line in zip(rows, made)]
    return rows


if __name__ == "__main__":
    main()

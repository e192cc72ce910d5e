"""A small decoder trained here in float, a second yardstick: ``python -m benchmarks.trained OUT.gguf``.

    corpus -> byte-level BPE of 4,096 tokens -> four layers of 256 channels, AdamW, about 20 minutes -> GGUF in float32

What :mod:`benchmarks.corpus` reads is on every machine with the project's environment, so no file of weights is
fetched, and the weights were never rounded: nothing of a grid is in them. ``python -m benchmarks.yardstick --gguf
OUT.gguf --spread 1`` measures on them. Unlike large models, a decoder of this size that has seen two million tokens has
no outliers to speak of: the largest input of a linear layer is some 30 times the median where the demo's model has
hundreds (before down projections 400, not 25,000). What a rotation takes away is hardly there, and a row that wins here
wins by its rounding. It predicts code best, prose poorly and German hardly better than by frequency, and so little
hangs on its layers that even 2 bits cost it less than a percent of perplexity: it shows whether a claim breaks, not
which of two rows is better; ``--steps`` says how far it goes. Widths are multiples of 256, as llama.cpp's k-quants need
them, where those of the demo's model are not.

``--type qwen3_moe`` trains a mixture of experts and ``--type gemma3_text`` a decoder with norms on both sides of its
layers, of the same sizes; OUT is then a folder that transformers loads. ``python -m benchmarks.learning --model OUT``
measures on either.

Training takes one thread. Learning is done after ``--steps``, or, on a slow machine, faded out to end with
``--minutes`` of CPU time. A file that was made by the same settings from the same text is kept as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional

from benchmarks.corpus import TOTAL, Corpus, read
from spinpass.cli.screen import Screen
from spinpass.progress import Progress

END = "<|endoftext|>"  # after every document
_ABOUT = "trained.json"  # in a folder: what it was made of
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}
"""What a part of a parameter's name is called in a GGUF file."""


LLAMA = "llama"
SHAPES: dict[str, dict[str, Any]] = {
    LLAMA: {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma3_text": {"sliding_window": 256, "query_pre_attn_scalar": 64},
}
"""The types of transformers that there are decoders of, with what they have beside the sizes of all."""


@dataclass(frozen=True)
class Settings:
    """The decoder and how it is trained: a batch has ``batch`` windows of ``context`` tokens."""

    type: str = LLAMA
    hidden: int = 256
    inner: int = 768
    layers: int = 4
    heads: int = 4
    cached: int = 2  # heads of keys and values
    vocabulary: int = 4096
    context: int = 512
    batch: int = 2
    steps: int = 2400
    rate: float = 3e-3
    decay: float = 0.1
    seed: int = 0


def main(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write, or folder for another type.")],
    type_: Annotated[str, typer.Option("--type", help=f"Of transformers: {', '.join(SHAPES)}.")] = LLAMA,
    steps: Annotated[int, typer.Option(help="Batches to learn from.")] = Settings.steps,
    minutes: Annotated[float, typer.Option(help="CPU minutes after which learning ends at the latest.")] = 40.0,
    total: Annotated[int, typer.Option(help="Characters of text to choose from.")] = TOTAL,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train the decoder, write it, and say how well it predicts documents that it has not seen."""
    torch.set_num_threads(1)
    if type_ not in SHAPES:
        raise typer.BadParameter(f"{type_!r} is not one of {', '.join(SHAPES)}")
    if (type_ == LLAMA) != (out.suffix == ".gguf"):
        raise typer.BadParameter(f"{out}: a decoder of type {LLAMA} is written as FILE.gguf, and others as a folder")
    screen, settings = Screen(as_json=as_json), Settings(type=type_, steps=steps, seed=seed)
    with screen.steps() as shown:
        shown.start("read")
        corpus = read(total)
        about = described(settings, corpus, minutes)
        if (found := kept(out, about)) is None:
            shown.start("tokenizer")
            tokenizer = trained_tokenizer(corpus.learned, settings.vocabulary)
            learned, held_out = (encoded(tokenizer, each) for each in (corpus.learned, corpus.held_out))
            model, done = trained(learned, settings, minutes, shown.start("train"))
            shown.start("score")
            found = {"steps": done, "tokens": done * settings.batch * settings.context}
            found |= scored(model, learned, held_out, settings) | about
            (write if type_ == LLAMA else write_folder)(model, tokenizer, settings, out, json.dumps(found))
    if as_json:
        screen.document(found)
    screen.show(
        f"{out}: {found['parameters']:,} parameters, {found['tokens']:,} tokens in {found['steps']:,} steps; held out "
        f"{found['loss']:.3f} nats per token, {found['unigram']:.3f} by frequency alone"
    )


def described(settings: Settings, corpus: Corpus, minutes: float) -> dict[str, Any]:
    """What a file is made of, JSON-able."""
    digest = hashlib.sha256("\0".join((*corpus.learned, "", *corpus.held_out)).encode()).hexdigest()
    return {"settings": asdict(settings), "minutes": minutes, "corpus": digest}


def kept(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run wrote about the file, where it was made of the same."""
    from gguf import GGUFReader

    try:
        if out.is_file():
            field = GGUFReader(out).fields.get("general.description")
            found = dict(json.loads(field.contents())) if field else {}
        elif (out / _ABOUT).is_file():
            found = dict(json.loads((out / _ABOUT).read_text(encoding="utf-8")))
        else:
            return None
    except ValueError:
        return None
    return found if about.items() <= found.items() else None


def trained_tokenizer(documents: Sequence[str], size: int) -> Any:
    """A byte-level BPE of ``size`` tokens, the first of them :data:`END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encoded(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """The tokens of all documents, each ended by :data:`END`."""
    end = tokenizer.token_to_id(END)
    found = [torch.tensor([*e.ids, end]) for e in tokenizer.encode_batch(list(documents), add_special_tokens=False)]
    return torch.cat(found)


def trained(ids: Tensor, settings: Settings, minutes: float, tick: Progress) -> tuple[Any, int]:
    """The decoder in eval mode after it has read windows of ``ids`` in random order, and the number of its steps."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(settings.seed)
    sizes = {
        "hidden_size": settings.hidden,
        "intermediate_size": settings.inner,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.cached,
        "vocab_size": settings.vocabulary,
        "max_position_embeddings": settings.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if settings.type != LLAMA:
        sizes |= {"head_dim": settings.hidden // settings.heads, "moe_intermediate_size": settings.inner // 4}
        sizes |= {"pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.type, **sizes, **SHAPES[settings.type]))
    matrices, flat = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": flat, "weight_decay": 0.0}]
    learner = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay)
    windows = ids[: len(ids) // settings.context * settings.context].view(-1, settings.context)
    rounds = settings.steps * settings.batch // len(windows) + 1
    order = torch.cat([torch.randperm(len(windows)) for _ in range(rounds)])
    began, done = time.process_time(), 0
    while (passed := max(done / settings.steps, (time.process_time() - began) / (60 * minutes))) < 1:
        for group in learner.param_groups:
            group["lr"] = settings.rate * min(1, (done + 1) / 100) * (0.02 + 0.98 * math.cos(passed * math.pi / 2) ** 2)
        batch = windows[order[done * settings.batch : (done + 1) * settings.batch]]
        _loss(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        learner.step()
        learner.zero_grad()
        done += 1
        tick(done, settings.steps)
    return model.eval(), done


def _loss(model: Any, windows: Tensor) -> Tensor:
    """The loss of every token but the first of its window, (windows, tokens - 1)."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def scored(model: Any, learned: Tensor, held_out: Tensor, settings: Settings) -> dict[str, Any]:
    """Nats per token of what was held out: by the decoder, and by the frequency of each token in what was learned."""
    windows = held_out[: len(held_out) // settings.context * settings.context].view(-1, settings.context)
    loss = torch.stack([_loss(model, window[None]).mean() for window in windows]).mean()
    counts = torch.bincount(learned, minlength=settings.vocabulary).double() + 1
    unigram = -(counts / counts.sum()).log()[windows[:, 1:]].mean()
    size = sum(p.numel() for p in model.parameters())
    return {"loss": float(loss), "unigram": float(unigram), "held_out_tokens": windows.numel(), "parameters": size}


def write(model: Any, tokenizer: Any, settings: Settings, out: Path, description: str) -> None:
    """Write a GGUF file in float32 that llama.cpp and transformers read."""
    from gguf import GGUFWriter, TokenType

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_suffix(f".{os.getpid()}.tmp")
    writer = GGUFWriter(staging, "llama")
    writer.add_name("trained")
    writer.add_description(description)
    writer.add_context_length(settings.context)
    writer.add_embedding_length(settings.hidden)
    writer.add_feed_forward_length(settings.inner)
    writer.add_block_count(settings.layers)
    writer.add_head_count(settings.heads)
    writer.add_head_count_kv(settings.cached)
    writer.add_rope_dimension_count(settings.hidden // settings.heads)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(settings.vocabulary)
    found = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token == END else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in found["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(tokens.index(END))
    writer.add_add_bos_token(False)
    for name, value in model.state_dict().items():
        for part, theirs in NAMES.items():
            name = name.replace(part, theirs)
        array = value.float().numpy()
        if heads := {"attn_q": settings.heads, "attn_k": settings.cached}.get(name.split(".")[-2]):
            array = interleaved(array, heads)
        writer.add_tensor(name.removeprefix("model."), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, out)


def write_folder(model: Any, tokenizer: Any, settings: Settings, out: Path, description: str) -> None:
    """Write a folder that transformers loads, with its tokenizer."""
    from transformers import PreTrainedTokenizerFast

    staging = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    model.save_pretrained(staging)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END).save_pretrained(
        staging
    )
    (staging / _ABOUT).write_text(description, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


def interleaved(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries or keys as GGUF has them: those of a pair that is turned together lie side by side."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


if __name__ == "__main__":
    typer.run(main)

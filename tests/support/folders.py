"""Tiny models as users have them on disk: a folder of transformers with a tokenizer, a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support import models

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported, which comes later

WORDS = [
    "what",
    "is",
    "the",
    "weather",
    "like",
    "a",
    "an",
    "if",
    "it",
    "in",
    "on",
    "and",
    "or",
    "not",
    "of",
    "to",
    "for",
]


def tokenizer() -> Any:
    """Words of :data:`WORDS` by whitespace, with a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]  # the stub wants a union of all kinds
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def letters_tokenizer() -> Any:
    """Byte-level BPE over the letters of :data:`WORDS`, at most 96 tokens: the kind that other runtimes read as well."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    pieces.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    pieces.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model_folder(folder: Path, name: str = "llama_tied", **config: Any) -> Path:
    """``save_pretrained`` of a tiny model and of the tokenizer; ``config`` overrides entries of its configuration."""
    model: Any = models.build(name, **config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def program_folder(folder: Path) -> Path:
    """``model.pt2``, a program without a cache, which loads in a moment, beside its tokenizer and ``text.txt``."""
    import torch

    from spinpass.formats import save_program
    from tests.support import programs

    save_program(programs.program("llama_tied", "hf", torch.float32), folder / "model.pt2")
    tokenizer().save_pretrained(folder)
    words = (WORDS[i * i % len(WORDS)] for i in range(400))
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def gguf_file(path: Path) -> Path:
    """A tiny llama with 32-bit weights and no tokenizer."""
    import gguf
    import torch

    hidden, ffn, heads, kv, vocabulary, layers = 32, 64, 4, 2, 96, 2
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    generator = torch.Generator().manual_seed(0)
    matrices = {"attn_q": (hidden, hidden), "attn_k": (kv * hidden // heads, hidden), "attn_output": (hidden, hidden),
                "attn_v": (kv * hidden // heads, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
                "ffn_down": (hidden, ffn), "attn_norm": (hidden,), "ffn_norm": (hidden,)}  # fmt: skip
    tensors = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in matrices.items()}
    tensors |= {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for name, shape in tensors.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""What lies beside a model in its folder: tokenizer, end tokens, the longest sequence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class ModelFolder:
    """A folder as ``spinpass export`` writes it, or another with the same files.

    Nothing is read before it is asked for.
    """

    path: Path

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded with transformers.

        Raises:
            ExportError: the folder has none, or transformers is missing.
        """
        if not any((self.path / name).is_file() for name in _TOKENIZER):
            raise ExportError(f"{self.path} holds no tokenizer: save one there with tokenizer.save_pretrained")
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise ExportError(
                f"text needs the package {error.name}: pip install transformers, or pass token ids"
            ) from error
        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The ``eos_token_id`` of generation_config.json or else of config.json, and none if neither has one."""
        for name in ("generation_config.json", "config.json"):
            value = self._read(name).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
        return frozenset()

    @cached_property
    def positions(self) -> int | None:
        """The longest sequence in tokens that config.json allows, or None where it says nothing."""
        config = self._read("config.json")
        return next((config[key] for key in _POSITIONS if config.get(key) is not None), None)

    def check_length(self, prompt: int, new: int) -> None:
        """Check that a prompt of so many tokens and so many new ones fit into the model.

        Raises:
            ConfigError: they are more than the model has positions for.
        """
        if self.positions is not None and prompt + new > self.positions:
            raise ConfigError(
                f"{prompt} tokens of prompt and {new} new ones are more than the {self.positions} positions that "
                f"{self.path / 'config.json'} names: shorten one of them"
            )

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(data, dict):
            raise ExportError(f"{path} is not a configuration: it holds a {type(data).__name__}")
        return data

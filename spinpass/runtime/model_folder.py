"""What lies beside a model in its folder: tokenizer, end tokens, how texts go on, the longest sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError, first_line
from spinpass.formats import check_companions, read_object

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_TOKENS = ("eos_token_id", "pad_token_id")
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
            ExportError: the folder has none, transformers is missing or cannot load it, or it would run code.
            VerificationError: its files are not those that ``spinpass.json`` lists.
        """
        if not any((self.path / name).is_file() for name in _TOKENIZER):
            raise ExportError(f"{self.path} holds no tokenizer: save one there with tokenizer.save_pretrained")
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise ExportError(
                f"text needs the package {error.name}: pip install transformers, or pass token ids"
            ) from error
        check_companions(self.path)
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # files, packages and the readers behind: no common base below Exception
            raise ExportError(f"the tokenizer of {self.path} cannot be loaded: {first_line(error)}") from error

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The ``eos_token_id`` of generation_config.json or else of config.json, and none if neither has one."""
        for name in ("generation_config.json", "config.json"):
            value = self._read(name).get("eos_token_id")
            if value is not None:
                tokens = value if isinstance(value, list) else [value]
                if not all(isinstance(token, int) for token in tokens):
                    raise ExportError(f"{self.path / name} has the eos_token_id {value!r}, which is no token")
                return frozenset(tokens)
        return frozenset()

    @cached_property
    def pad_token(self) -> int | None:
        """The ``pad_token_id`` of generation_config.json or else of config.json, None where neither names one."""
        named = (self._read(name).get("pad_token_id") for name in ("generation_config.json", "config.json"))
        return next((token for token in named if isinstance(token, int) and token >= 0), None)

    @cached_property
    def search_defaults(self) -> dict[str, Any]:
        """What generation_config.json says of how a text goes on, without the tokens that have a property here."""
        found = self._read("generation_config.json")
        return {name: value for name, value in found.items() if name not in _TOKENS and value is not None}

    @cached_property
    def positions(self) -> int | None:
        """The longest sequence in tokens that config.json allows, or None where it says nothing."""
        config = self._read("config.json")
        found = next((config[key] for key in _POSITIONS if config.get(key) is not None), None)
        if found is not None and not isinstance(found, int):
            raise ExportError(f"{self.path / 'config.json'} allows {found!r} positions, which is no number of tokens")
        return found

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
        check_companions(self.path, name)
        return read_object(path)

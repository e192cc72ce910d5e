"""What can be said of a model before its weights are read: seconds, where loading and exporting take minutes.

source -> configuration -> text -> tokenizer -> tokens -> kernels -> disk -> memory
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError, ExportError
from spinpass.evaluation import SELF, library_docs, read_text, token_ids
from spinpass.formats import check_free
from spinpass.loading import (
    STREAMED_BYTES,
    Source,
    StoredModel,
    check_context,
    count_values,
    load_config,
    load_tokenizer,
    locate,
    stored_model,
)

from .forecast import MARGIN, Forecast, fitting
from .machine import IMPORTED, free_memory, own_memory, said
from .request import ExportRequest
from .workload import Workload

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "torch.float32": 4, "torch.float16": 2, "torch.bfloat16": 2}
_HEAD_STEP = 8  # GroupQueryAttention's heads are multiples of this
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")  # heads of another size than the configuration's


@dataclass(frozen=True)
class Known:
    """A model that is not loaded: where it is, and its configuration (None for a file)."""

    source: Source
    config: Any
    trust_remote_code: bool

    @classmethod
    def of(cls, model: str, *, dequantize: bool, trust_remote_code: bool) -> Known:
        """Find the model. Raises ConfigError and ExportError as :func:`spinpass.loading.load_config`."""
        source = locate(model)
        config = load_config(source, dequantize=dequantize, trust_remote_code=trust_remote_code)
        return cls(source, config, trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, None where there is none."""
        return load_tokenizer(self.source, trust_remote_code=self.trust_remote_code)

    def token_ids(self, text: Path | None) -> list[int]:
        """The tokens of a text, of Python's documentation for None. Raises ConfigError where it cannot be read, or
        there is no tokenizer for it."""
        found = library_docs() if text is None else read_text(text)
        self._check_tokenizer(text or "a text")
        return token_ids(self.tokenizer)(found)

    def windows_of(self, named: str | Path, read: str, length: int, count: int | None, most: int) -> int:
        """Return how many calibration windows are cut from a text.

        Args:
            named: its file, or what stands in place of one.
            read: the text, where it was read already.
            length: tokens of a window.
            count: how many windows are asked for; None for what the text holds, at most ``most``.

        Raises ConfigError: the text is too short, cannot be read, or there is no tokenizer for it.
        """
        if not read and named != SELF:
            read = read_text(Path(named))
        self._check_tokenizer(named)
        if named == SELF:
            return count or most
        tokens = len(token_ids(self.tokenizer)(read))
        held = tokens // length
        if held < (count or 1):
            asked = f"--samples {count}" if count else "one window to calibrate on"
            fewer = f", --samples {held} at most" if held else ""
            raise ConfigError(
                f"{asked} needs {(count or 1) * length:,} tokens of {named}, which has {tokens:,}: choose a longer "
                f"text with --calibration{fewer}"
            )
        return count or min(most, held)

    def _check_tokenizer(self, named: str | Path) -> None:
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.source.location} has no tokenizer to read {named} with: save one there with "
                "tokenizer.save_pretrained, round without a text (--recipe plain, or a scheme with -rtn), or keep the "
                "values with --bits 16"
            )

    def check_context(self, context: int) -> None:
        """Raise ConfigError where the model takes no cache of so many tokens."""
        if self.config is not None:
            check_context(context, self.config.get_text_config())

    def check_integer_cache(self, kind: str, dtype: str) -> None:
        """Raise where a cache of integers is known not to be possible: ONNX Runtime's attention has no kernel for it.

        Raises:
            ConfigError: ``dtype`` is auto, and the weights, and so keys and values, are stored in another than float32.
            ExportError: the heads have a size that the kernel does not take.
        """
        if self.config is None:
            return
        config = self.config.get_text_config()
        if dtype == "auto" and self.dtype_bytes(dtype) != _BYTES["float32"]:
            raise ConfigError(f"--kv-cache {kind} needs keys and values in float32: leave out --dtype auto")
        heads = getattr(config, "num_attention_heads", None)
        width = getattr(config, "head_dim", None) or (heads and getattr(config, "hidden_size", 0) // heads)
        if isinstance(width, int) and width % _HEAD_STEP and not any(hasattr(config, name) for name in _LATENT):
            raise ExportError(
                f"only ONNX Runtime's own attention reads a cache of integers, and this is not it: its heads are of "
                f"size {width}, and GroupQueryAttention takes multiples of {_HEAD_STEP}; leave out --kv-cache {kind}"
            )

    def check_integer_kernels(self, dtype: str) -> None:
        """Raise ConfigError where weights are to be integers beside a dtype that ONNX Runtime's kernels do not take."""
        if self._named(dtype).endswith("bfloat16"):
            raise ConfigError(
                "ONNX Runtime has no kernel for integer weights beside bfloat16 (MatMulNBits on a CPU): choose --dtype "
                "float32 or float16, or keep the values with --bits 16"
            )

    def check_openvino(self, dtype: str, *, integers: bool) -> None:
        """Raise ConfigError where the weights are stored in a dtype that an OpenVINO folder cannot have."""
        named = self._named(dtype).removeprefix("torch.")
        if named == "bfloat16" or (integers and named == "float16"):
            raise ConfigError(
                f"the weights are stored in {named}, which --to openvino cannot take: choose --dtype float32"
            )

    def _named(self, dtype: str) -> str:
        """The dtype that the weights will have, of a configuration where it is ``auto``."""
        return str(getattr(self.config, "dtype", None)) if dtype == "auto" else dtype

    def dtype_bytes(self, dtype: str) -> int:
        """Bytes of a weight in the program."""
        return _BYTES.get(self._named(dtype), 2)

    def workload(self, request: ExportRequest, windows: int | None = None) -> Workload | None:
        """Return how much an export has to do; None where nothing on this machine says how large the model is.

        ``windows``: how many calibrate; None for what is asked for, or the most by default.
        """
        stored = stored_model(self.source)
        if self.source.kind == "program":
            file = Path(self.source.location)
            stored = StoredModel(((file.stat().st_size // 4,),), file.stat().st_size, False, (file,))
        return None if stored is None else Workload.of(request, stored, self.config, windows)

    def check_memory(self, request: ExportRequest, work: Workload | None) -> None:
        """Raise ExportError where a run needs more memory than there is, whatever the forecast is off by.

        There is ``request.memory``, or what is free on this machine and in its control group.
        """
        if work is None:
            return
        # what is free is free beside what this process has already, what is allowed is for all of it
        forecast, own = Forecast.of(work), own_memory()
        imported = max(0, IMPORTED - own) + (0 if request.memory_bytes is None else own)
        there = request.memory_bytes or free_memory()
        if forecast.least_bytes + imported <= there:
            return
        setting = fitting(work, there - imported)
        needed = f"{said(forecast.memory_bytes + imported)} of memory"
        needed = f"about {needed}, give or take {MARGIN:.0%}" if forecast.exact else f"at least {needed}"
        advice = f"try {setting}" if setting else "take a machine with more, or a smaller model"
        whose = "are allowed" if request.memory_bytes else "are free"
        raise ExportError(
            f"this needs {needed}, and {said(there)} {whose}: {advice}; or say with --memory what it may take"
        )

    def check_disk(
        self, out: Path, dtype: str, bits: float | None, *, floats: bool, codes: bool, kept: int = 0
    ) -> None:
        """Make sure that the disk holds what is written, which is estimated from below.

        Args:
            out: the folder that is to be written, and beside which intermediate files lie.
            dtype: of the weights.
            bits: of a weight in the result; None for those of the dtype.
            floats: a file in the dtype is written first.
            codes: where the weights are read from their files, their integers are kept beside it, a byte for each.
            kept: bytes of such integers that a run which was stopped has left there.

        Raises ExportError: there is too little space.
        """
        if self.source.kind == "program":
            whole = Path(self.source.location).stat().st_size
            values = whole // 4
        else:
            values = count_values(self.source) or 0
            whole = values * self.dtype_bytes(dtype)
        result = whole if bits is None else int(values * bits / 8)
        left = max(0, values - kept) if codes and whole > STREAMED_BYTES else 0
        check_space(out, result, (whole if floats else 0) + left)


def check_space(out: Path, result: int, intermediate: int = 0) -> None:
    """Raise ExportError where the disk of a folder, which need not be there yet, does not hold so many bytes."""
    also = f" and {intermediate:,} for what it is made of" if intermediate else ""
    check_free(out, result + intermediate, f"the result needs about {result:,} bytes{also},")

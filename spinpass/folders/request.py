"""What an export is asked for, and how it is carried out: by ``spinpass export``, or by :func:`export` from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import CALIBRATION_LENGTH, SHIPPED_TEXT, calibration_text, check_windows
from spinpass.formats import Draft, drafted
from spinpass.loading import check_dtype, check_program_options, load_model
from spinpass.passes import last_token
from spinpass.progress import Silent, Steps
from spinpass.quantization import QuantizationConfig, Weights

from .companions import Written, check_target
from .executorch import executorch_tools, write_pte_folder
from .gptq import WEIGHTS_ONLY, check_offline, check_rotation, write_gptq_folder
from .onnx import CacheBits, onnx_tools, write_folder
from .preflight import Known
from .recipes import RecipeName, recipe_of
from .result import Result, quantized, rotated

Target = Literal["onnx", "executorch", "gptq"]
IntegerCache = Literal["int8", "int4"]


CONTEXT = 1024
"""Tokens of the cache inside an ExecuTorch program where none are asked for."""

_DEFAULT = RotationConfig()
_EXPERTS = {"onnx": "grouped_mm", "executorch": "batched_mm"}
"""The implementation of a mixture's experts, as transformers calls it, whose operators the target has.

``batched_mm`` gathers the weights of every token's experts: 151 MB for each token in each layer of a model of width
2048 with eight experts of width 768 at a time. The grouped product reads a weight once, however many tokens go to it.
"""


def export(
    model: str | Path,
    out: str | Path,
    config: RotationConfig | None = _DEFAULT,
    *,
    to: Target = "onnx",
    bits: int | None = None,
    recipe: RecipeName = "auto",
    quantize: str = "",
    keep: Sequence[str] = (),
    layers: Sequence[tuple[str, str]] = (),
    calibration: str | Path | None = None,
    calibration_windows: int | None = None,
    int4: bool = False,
    kv_cache: IntegerCache | None = None,
    dtype: str = "float32",
    cache: bool = True,
    context: int | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    last_logits: bool = False,
    fuse: bool = True,
    certify: bool = True,
    allow_partial: bool = False,
    force: bool = False,
    steps: Steps | None = None,
) -> Written:
    """Load a model, rotate it, certify it, and write a folder that a runtime runs: ``spinpass export`` from Python.

    Args:
        model: a model folder, a name on the hub, a GGUF file or a .pt2 file.
        out: the folder that is written: the model, its tokenizer and configuration, ``spinpass.json``.
        config: what is rotated; None writes the original, to compare with.
        to: the runtime that the folder is for, or ``"gptq"`` for a checkpoint.
        bits: of the weights: 16 keeps the values, 8, 4, 3 and 2 take what :mod:`.recipes` says for the runtime, and the
            written file is scored. None leaves that to ``quantize``.
        recipe: with ``bits``: ``auto``, the best that was measured, ``quick``, the same on less text, or ``plain``,
            rounding to nearest without rotation. A ``config`` of yours is rotated by in its place.
        quantize: a scheme, for example ``"w4g128-gptq-a8"``; with none, nothing is rounded.
        keep: patterns of parameter names whose layers are left in floats; one that matches nothing is an error.
        layers: pairs of a pattern of parameter names and a scheme of weights for their layers; the first match counts.
        calibration: a UTF-8 text for GPTQ, static ranges and ``kv_cache``; by default, where one is needed, the text of
            this package.
        calibration_windows: how many windows of 512 tokens of the text are read; by default what it holds, at most 16.
        int4: pack the weights to 4 bits (MatMulNBits), without a scheme.
        kv_cache: keep keys and values as integers of this width (ONNX Runtime).
        dtype: that of the weights, float32, float16 or bfloat16; ``"auto"`` takes the dtype they are stored in.
        cache: export with a KV cache; without one the program takes whole prompts alone.
        context: how many tokens the KV cache inside an ExecuTorch program holds, 1024 by default.
        dequantize: where the model is quantized (GPTQ, FP8, MXFP4), take the values of its codes.
        trust_remote_code: run the modelling code that comes with the model.
        last_logits: compute the logits of the last token alone.
        fuse: use ONNX Runtime's own operators for attention.
        certify: prove the rotated program, and the file, equivalent before anything stays on the disk.
        allow_partial: where that proof fails, leave out the rotations to blame instead of raising.
        force: write into a folder that holds files of others, too.
        steps: told what begins.

    Returns:
        The exporter's report, what ``spinpass.json`` holds (plan, certificates, hashes), and the names of all files.

    Raises:
        ConfigError: a combination that means nothing, a model or text that cannot be read.
        ExportError: the runtime's packages are missing, or the folder cannot be written.
        RefusedError: nothing can be rotated.
        VerificationError: the rotated program, or the file, is not equivalent.
    """
    text = None if calibration is None else Path(calibration)
    request = ExportRequest(
        str(model), Path(out), config, to, quantize=quantize, calibration=text, int4=int4, kv_cache=kv_cache,
        dtype=dtype, cache=cache, context=context, dequantize=dequantize, bits=bits, recipe=recipe,
        keep=tuple(keep), layers=tuple(layers),
        trust_remote_code=trust_remote_code, last_logits=last_logits, fuse=fuse, certify=certify,
        calibration_windows=calibration_windows, force=force, allow_partial=allow_partial,
    )  # fmt: skip
    steps = steps or Silent()
    try:
        return request.run(steps)[1]
    finally:
        steps.finish()


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of :func:`export`. Raises ConfigError for combinations that mean nothing."""

    model: str
    out: Path
    config: RotationConfig | None
    to: Target = "onnx"
    quantize: str = ""
    calibration: Path | None = None
    int4: bool = False
    kv_cache: IntegerCache | None = None
    dtype: str = "float32"
    cache: bool = True
    context: int | None = None
    dequantize: bool = False
    trust_remote_code: bool = False
    last_logits: bool = False
    fuse: bool = True
    certify: bool = True
    calibration_windows: int | None = None
    force: bool = False
    allow_partial: bool = False
    bits: int | None = None
    recipe: RecipeName = "auto"
    keep: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self._check_values()
        self._follow_recipe()
        if self.quantize and self.int4:
            raise ConfigError("--int4 rounds the weights by itself: leave it out with --quantize")
        if self._scheme is not None:
            object.__setattr__(self, "calibration", calibration_text(self._scheme, self.calibration))
        if self.kv_cache is not None and self.calibration is None:
            object.__setattr__(self, "calibration", SHIPPED_TEXT)
        check_windows(self.calibration_windows, self.calibration)
        self._check_used()
        if self.to == "gptq":
            self._check_checkpoint()
        if self.to == "executorch":
            self._check_executorch()
        elif self.kv_cache is not None:
            self._check_integer_cache()

    def _check_values(self) -> None:
        for name, value, allowed in (
            ("to", self.to, get_args(Target)),
            ("kv_cache", self.kv_cache, (None, *get_args(IntegerCache))),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")
        check_dtype(self.dtype)
        if self.config is not None and not isinstance(self.config, RotationConfig):
            raise ConfigError(f"config is a {type(self.config).__name__}: give a spinpass.RotationConfig or None")
        if self.config is not None and self.config.verify not in (None, self.certify):
            raise ConfigError(
                f"verify={self.config.verify} in config and certify={self.certify} disagree: leave one out"
            )

    def _follow_recipe(self) -> None:
        """Set what the recipe says. Raises ConfigError where something else says the same."""
        if self.bits is None:
            if self.recipe != "auto":
                raise ConfigError(f"--recipe {self.recipe} is of a number of bits: add --bits, for example 4")
            return
        for option, given in (("--quantize", self.quantize), ("--int4", self.int4)):
            if given:
                raise ConfigError(f"--bits {self.bits} and {option} both say how to round: leave one of them out")
        followed = recipe_of(self.recipe, self.bits, self.to)
        if self.config == _DEFAULT:
            object.__setattr__(self, "config", followed.config)
        object.__setattr__(self, "quantize", followed.scheme)
        if self.calibration_windows is None and self.calibration is None:
            object.__setattr__(self, "calibration_windows", followed.windows)

    def _check_used(self) -> None:
        """Raise ConfigError where an option is given that nothing would read."""
        if self.calibration is not None and not self.quantize and self.kv_cache is None:
            what = "--int4 rounds to nearest, without a text" if self.int4 else "nothing is quantized"
            raise ConfigError(f"{what}: leave out --calibration, or use it, for example with --quantize w4g128-gptq-a8")
        if (self.keep or self.layers) and self._scheme is None:
            raise ConfigError("--keep and --layer are of layers that are quantized: add --bits or --quantize")
        scheme = self._scheme
        unread = scheme is not None and not scheme.uses_calibration and self.kv_cache is None
        if self.calibration is not None and unread:
            raise ConfigError(f"{self.quantize} rounds without a text: leave out --calibration, or use -gptq or static")
        if self.context is not None and self.to != "executorch":
            raise ConfigError(
                f"--context is the size of a cache inside an ExecuTorch program: leave it out with --to {self.to}"
            )
        if not self.fuse and self.to != "onnx":
            raise ConfigError(f"--no-fuse is for ONNX: leave it out with --to {self.to}")

    def _check_checkpoint(self) -> None:
        if self.int4 or self.kv_cache is not None:
            raise ConfigError(
                "--int4 and --kv-cache are ONNX Runtime's: use --quantize with --to gptq, for example w4g128-gptq"
            )
        if self.last_logits:
            raise ConfigError("a checkpoint has no logits: leave out --last-logits with --to gptq")
        if not self.cache:
            raise ConfigError("a checkpoint is no program and has no cache: leave out --no-cache with --to gptq")
        scheme = self._scheme
        if scheme is None or scheme.weights is None:
            raise ConfigError(WEIGHTS_ONLY)
        if scheme.activations is not None or scheme.cache is not None:
            raise ConfigError("a GPTQ checkpoint holds weights alone: leave the parts a… and kv… out of --quantize")
        if scheme.mixed_rows:
            raise ConfigError("weights of a GPTQ checkpoint have one width each: leave the part rows out of --quantize")
        if self.config is not None:
            check_offline(self.config)

    def _check_executorch(self) -> None:
        if self.int4:
            raise ConfigError("--int4 packs for ONNX Runtime: use --quantize w4g32-gptq-a8 with --to executorch")
        if not self.cache:
            raise ConfigError("--to executorch writes a decoder with its cache inside: leave --no-cache out")
        if self.kv_cache is not None:
            raise ConfigError("--kv-cache is ONNX Runtime's: leave it out with --to executorch")

    def _check_integer_cache(self) -> None:
        if self._scheme is not None and self._scheme.cache is not None:
            raise ConfigError(
                f"--kv-cache {self.kv_cache} and the part kv… of {self.quantize} both say how keys and values are "
                "kept: leave one of them out"
            )
        if self.dtype in ("float16", "bfloat16"):
            raise ConfigError(
                f"--kv-cache {self.kv_cache} needs keys and values in float32: leave out --dtype {self.dtype}"
            )
        if not (self.fuse and self.cache):
            raise ConfigError("--kv-cache is GroupQueryAttention's: leave out --no-fuse and --no-cache")

    @property
    def _scheme(self) -> QuantizationConfig | None:
        if not self.quantize:
            return None
        overrides = {pattern: _weights_of(pattern, scheme) for pattern, scheme in self.layers}
        return replace(QuantizationConfig.parse(self.quantize), exclude=self.keep, overrides=overrides)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the combination, a sentence each."""
        found = []
        if self.to == "onnx" and self.dtype == "bfloat16":
            found.append(
                "ONNX Runtime has no bfloat16 kernels on a CPU: the file is for other providers, and not certified here"
            )
        if self.int4 and self.config is not None:
            found.append(
                "4-bit weights alone seldom gain from a rotation and may lose: compare with --rotations none, or round "
                "activations as well, --quantize w4g128-gptq-a8"
            )
        scheme = self._scheme
        if self.to == "onnx" and scheme is not None and scheme.weights is not None and scheme.activations is None:
            found.append(
                f"{self.quantize} leaves activations alone: ONNX Runtime multiplies in floats, and decoding is several "
                "times slower than with -a8"
            )
        rotation = self.config
        if scheme is not None and rotation is not None and rotation.form == "auto" and "R1" in rotation.rotations:
            found.append(
                "form auto folds R1 into the weights where it can, norm scales included; --form online costs two "
                "Hadamards per layer and usually loses less under quantization (spinpass tune measures it)"
            )
        return found

    def run(self, steps: Steps) -> tuple[Result, Written]:
        """Load, rotate, certify, quantize, write. What is missing is said before the minutes of work.

        Raises ConfigError, ExportError, RefusedError and VerificationError, as :func:`export`.
        """
        check_target(self.out, self.model, force=self.force)
        write = self._writer()
        with drafted(self.out) as draft:
            self.preflight()
            return self._run(write, draft, steps)

    def _run(self, write: Callable[..., Written], draft: Draft, steps: Steps) -> tuple[Result, Written]:
        loaded = load_model(
            self.model,
            dtype=self.dtype,
            cache=self.cache and self.to != "gptq",
            context=self._context,
            dequantize=self.dequantize,
            trust_remote_code=self.trust_remote_code,
            experts=_EXPERTS.get(self.to),
            progress=steps.begin,
        )
        if self.to == "onnx":
            onnx_tools().check_operators(loaded.program)
            if self.certify:
                onnx_tools().check_kernels(loaded.program)
        result = rotated(loaded.program, self.config, steps, certify=self.certify, allow_partial=self.allow_partial)
        if self.to == "gptq":
            check_rotation(loaded, result)
        if self._scheme is not None:
            result = quantized(result, loaded, self._scheme, self.calibration, steps, self.calibration_windows)
        if self.last_logits:
            result = replace(result, program=last_token(result.program), scored=result.program)
        return result, write(loaded, result, draft, steps, certify=self.certify)

    @property
    def _context(self) -> int | None:
        return (self.context or CONTEXT) if self.to == "executorch" else None

    def preflight(self) -> None:
        """Say what can be said before the weights are read: model, text, tokenizer, tokens, kernels, disk.

        Raises ConfigError and ExportError, as :func:`export`.
        """
        known = Known.of(self.model, dequantize=self.dequantize, trust_remote_code=self.trust_remote_code)
        check_program_options(
            known.source,
            dtype=self.dtype in ("float16", "bfloat16"),
            no_cache=not self.cache,
            context=self.context is not None,
            dequantize=self.dequantize,
            trust_remote_code=self.trust_remote_code,
        )
        if self.calibration is not None:
            longest = min(CALIBRATION_LENGTH, self._context or CALIBRATION_LENGTH)
            known.check_text(self.calibration, longest, self.calibration_windows)
        if self._context is not None:
            known.check_context(self._context)
        if self.kv_cache is not None:
            known.check_integer_cache(self.kv_cache, self.dtype)
        if self.to == "onnx" and self._stored_bits is not None:
            known.check_integer_kernels(self.dtype)
        if self.to == "onnx" and self.certify and self.dtype in ("float16", "bfloat16"):
            onnx_tools().check_dtypes({self.dtype})
        known.check_disk(self.out, self.dtype, self._stored_bits, steps=self._copies)

    @property
    def _stored_bits(self) -> float | None:
        """How many bits a weight has in the result, at least; None for those of the dtype."""
        scheme = self._scheme
        if self.int4:
            return 4.0
        if scheme is None or scheme.weights is None:
            return None
        return float(scheme.average_bits or scheme.weights.bits)

    @property
    def _copies(self) -> bool:
        """Whether a file in the program's dtype is written first, beside what is made of it."""
        return self.to == "onnx" and (self._stored_bits is not None or self.kv_cache is not None)

    def _writer(self) -> Callable[..., Written]:
        """The function that writes the folder, with its packages imported. Raises ExportError where one is missing."""
        if self.to == "gptq":
            return write_gptq_folder
        if self.to == "executorch":
            return partial(write_pte_folder, executorch_tools())
        bits = None
        if self.kv_cache is not None and self.calibration is not None:
            bits = CacheBits(int(self.kv_cache.removeprefix("int")), self.calibration, self.calibration_windows)
        card = self.bits is not None
        return partial(write_folder, onnx_tools(), int4=self.int4, fuse=self.fuse, cache=bits, card=card)


def _weights_of(pattern: str, scheme: str) -> Weights:
    """Return how a layer's weights are rounded by a scheme. Raises ConfigError where it says more than that."""
    parsed = QuantizationConfig.parse(scheme)
    if parsed.weights is None or parsed != replace(QuantizationConfig(), weights=parsed.weights):
        raise ConfigError(f"--layer {pattern}={scheme}: name weights alone for a layer, for example w8-rtn")
    return parsed.weights

"""What an export is asked for, by ``spinpass export`` or from Python: values, and what they may not be together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import CALIBRATION_WINDOWS, SHIPPED_TEXT, check_windows
from spinpass.graph import HOST, Device, named_device
from spinpass.learning import Learning
from spinpass.loading import check_dtype
from spinpass.planning import RotationPlan
from spinpass.quantization import FINE, QuantizationConfig, Weights

from .gptq import WEIGHTS_ONLY, check_offline, check_weights_alone
from .recipes import DEFAULT_BITS, LearnName, RecipeName, bases_of, learning_of, recipe_of

Target = Literal["onnx", "openvino", "executorch", "gptq"]
IntegerCache = Literal["int8", "int4"]


_DEFAULT = RotationConfig()
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of :func:`.making.export`. Raises ConfigError for combinations that mean nothing."""

    model: str
    out: Path
    config: RotationConfig | None
    to: Target = "onnx"
    quantize: str = ""
    calibration: str | Path | None = None
    int4: bool = False
    kv_cache: IntegerCache | None = None
    dtype: str = "float32"
    cache: bool = True
    context: int | None = None
    dequantize: bool = False
    trust_remote_code: bool = False
    last_logits: bool | None = None
    fuse: bool = True
    certify: bool = True
    calibration_windows: int | None = None
    force: bool = False
    allow_partial: bool = False
    bits: int | None = None
    recipe: RecipeName = "auto"
    keep: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()
    compare: bool = False
    learn: LearnName | None = None
    minutes: float | None = None
    learning_seed: int = 0
    device: Device = HOST
    memory: str | int | None = None
    plan: RotationPlan | None = None
    most_windows: int = field(default=CALIBRATION_WINDOWS, init=False)  # where the text holds so many

    def __post_init__(self) -> None:
        self._follow_plan()
        self._check_values()
        self._follow_recipe()
        if self.quantize and self.int4:
            raise ConfigError("--int4 rounds the weights by itself: leave it out with --quantize")
        scheme = self.scheme
        if self.calibration is None and ((scheme and scheme.needs_calibration) or self.kv_cache is not None):
            object.__setattr__(self, "calibration", SHIPPED_TEXT)
        if self.calibration_windows is not None and self.calibration is None and self.bits is not None:
            raise ConfigError(f"--samples {self.calibration_windows}: nothing here reads a text: leave it out")
        check_windows(self.calibration_windows, self.calibration)
        self._check_used()
        if self.to == "gptq":
            self._check_checkpoint()
        if self.to == "executorch":
            self._check_executorch()
        elif self.to == "openvino":
            self._check_openvino()
        elif self.kv_cache is not None:
            self._check_integer_cache()

    def _check_values(self) -> None:
        for name, value, allowed in (
            ("to", self.to, get_args(Target)),
            ("learn", self.learn, (None, *get_args(LearnName))),
            ("kv_cache", self.kv_cache, (None, *get_args(IntegerCache))),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes {self.minutes}: choose more than 0, or leave it out")
        if not isinstance(self.learning_seed, int) or self.learning_seed < 0:
            raise ConfigError(f"--learning-seed {self.learning_seed}: choose an integer from 0 on")
        check_dtype(self.dtype)
        object.__setattr__(self, "device", named_device(self.device))
        if self.memory is not None and not self.memory_bytes:
            raise ConfigError(f"--memory {self.memory} is no size: write it as 12GB, 500MB or 8GiB")
        if self.calibration == "":
            raise ConfigError("--calibration '' names no text: name a file, a dataset or self, or leave it out")
        if self.config is not None and not isinstance(self.config, RotationConfig):
            raise ConfigError(f"config is a {type(self.config).__name__}: give a spinpass.RotationConfig or None")
        if self.config is not None and self.config.verify not in (None, self.certify):
            raise ConfigError(
                f"verify={self.config.verify} in config and certify={self.certify} disagree: leave one out"
            )

    def _follow_plan(self) -> None:
        """Take the configuration of the plan. Raises ConfigError where another is given beside it."""
        if self.plan is None:
            return
        if not isinstance(self.plan, RotationPlan):
            raise ConfigError(f"plan is a {type(self.plan).__name__}: give what spinpass.load_plan returns, or None")
        if self.config != _DEFAULT:
            raise ConfigError(
                "--plan has rotations of its own: leave out --rotations and the other options of rotations, or --plan"
            )
        object.__setattr__(self, "config", replace(self.plan.config, verify=None))  # which ``certify`` says

    def _follow_recipe(self) -> None:
        """Set what the recipe says. Raises ConfigError where something else says the same."""
        for option, given in (("--quantize", self.quantize), ("--int4", self.int4)):
            if given and self.bits is not None:
                raise ConfigError(f"--bits {self.bits} and {option} both say how to round: leave one of them out")
            if given and self.recipe != "auto":
                raise ConfigError(f"--recipe {self.recipe} and {option} both say how to round: leave one of them out")
            if given:
                return
        bits = DEFAULT_BITS if self.bits is None else self.bits
        if bits == 16 and self.recipe == "quick":
            raise ConfigError("--recipe quick is a way to round, and --bits 16 keeps the values: leave one of them out")
        followed = recipe_of(self.recipe, bits, self.to, rounds_cache=self.kv_cache is not None)
        object.__setattr__(self, "bits", bits)
        if self.config == _DEFAULT and self.plan is None:
            object.__setattr__(self, "config", followed.config)
        object.__setattr__(self, "quantize", followed.scheme)
        if self.calibration is None and followed.windows is not None:
            object.__setattr__(self, "most_windows", followed.windows)

    def _check_used(self) -> None:
        """Raise ConfigError where an option is given that nothing would read."""
        scheme = self.scheme
        if self.calibration is not None and not self.quantize and self.kv_cache is None:
            what = "--int4 rounds to nearest, without a text" if self.int4 else "nothing is quantized"
            raise ConfigError(f"{what}: leave out --calibration, or use it, for example with --quantize w4g128-gptq-a8")
        if self.compare and (self.config is None or not (scheme or self.int4)):
            why = "the original" if self.config is None else "in floats"
            raise ConfigError(f"--compare is of a rotated model and its original, both rounded, and this is {why}")
        self._check_learning()
        patterns = [pattern for pattern, _ in self.layers]
        twice = next((pattern for pattern in patterns if patterns.count(pattern) > 1), None)
        if twice is not None:
            raise ConfigError(f"--layer {twice}=… is given twice: leave one of them out")
        if (self.keep or self.layers) and scheme is None:
            raise ConfigError("--keep and --layer are of layers that are quantized: add --bits or --quantize")
        unread = scheme is not None and not scheme.uses_calibration and self.kv_cache is None
        if self.calibration is not None and unread:
            raise ConfigError(f"{self.quantize} rounds without a text: leave out --calibration, or use -gptq or static")
        if self.context is not None and self.to != "executorch":
            raise ConfigError(
                f"--context is the size of a cache inside an ExecuTorch program: leave it out with --to {self.to}"
            )
        if not self.fuse and self.to != "onnx":
            raise ConfigError(f"--no-fuse is for ONNX: leave it out with --to {self.to}")

    def _check_learning(self) -> None:
        """Raise ConfigError where something is to be learned of what learns nothing."""
        if self.minutes is not None and self.learn == "none":
            raise ConfigError("--learn none and --minutes disagree: leave one of them out")
        scheme = self.scheme
        option = f"--learn {self.learn}" if self.learn is not None else f"--minutes {self.minutes}"
        if self.learn in (None, "none") and self.minutes is None:
            if self.learning_seed and (scheme is None or scheme.learn is None):
                raise ConfigError(f"--learning-seed {self.learning_seed}: nothing is learned here, so leave it out")
            return
        if self.int4 or scheme is None or scheme.weights is None:
            raise ConfigError(f"{option} is of rounded weights: add --bits or --quantize, or leave it out")
        if self.bits is not None and self.recipe == "plain":
            raise ConfigError(f"--recipe plain rounds to nearest without a text: leave it or {option} out")

    def _check_checkpoint(self) -> None:
        if self.int4 or self.kv_cache is not None:
            raise ConfigError(
                "--int4 and --kv-cache are ONNX Runtime's: use --quantize with --to gptq, for example w4g128-gptq"
            )
        if self.last_logits is not None:
            raise ConfigError("a checkpoint has no logits: leave out --last-logits and --all-logits with --to gptq")
        if not self.cache:
            raise ConfigError("a checkpoint is no program and has no cache: leave out --no-cache with --to gptq")
        scheme = self.scheme
        if scheme is None or scheme.weights is None:
            raise ConfigError(WEIGHTS_ONLY)
        check_weights_alone(scheme, "gptq")
        if self.config is not None:
            check_offline(self.config)

    def _check_executorch(self) -> None:
        if self.int4:
            raise ConfigError(
                "--int4 packs for ONNX Runtime: leave it out, or name a scheme with --quantize, for --to executorch"
            )
        if not self.cache:
            raise ConfigError("--to executorch writes a decoder with its cache inside: leave --no-cache out")
        if self.kv_cache is not None:
            raise ConfigError("--kv-cache is ONNX Runtime's: leave it out with --to executorch")

    def _check_openvino(self) -> None:
        if self.int4:
            raise ConfigError("--int4 packs for ONNX Runtime: use --bits 4 with --to openvino")
        if self.kv_cache is not None:
            raise ConfigError("--kv-cache is ONNX Runtime's: leave it out with --to openvino")
        scheme = self.scheme
        if scheme is not None and (scheme.activations is not None or scheme.cache is not None):
            raise ConfigError(
                "OpenVINO rounds activations and caches by itself, as it runs: leave the parts a… and kv… out of "
                f"--quantize {self.quantize}"
            )
        if self.dtype == "bfloat16":
            raise ConfigError("OpenVINO's Python interface has no bfloat16: choose --dtype float32 or float16")
        if scheme is not None and self.dtype == "float16":
            raise ConfigError(
                "OpenVINO multiplies by integers in float32: leave out --dtype float16, or keep the values with "
                "--bits 16"
            )

    def _check_integer_cache(self) -> None:
        if self.scheme is not None and self.scheme.cache is not None:
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
    def memory_bytes(self) -> int | None:
        """How much memory the run may take; None for what is free, 0 where ``memory`` is no size."""
        if self.memory is None:
            return None
        found = _SIZE.fullmatch(str(self.memory).strip())
        if found is None:
            return 0
        step = 1024 if found[3] else 1000
        return int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " "))

    @property
    def scheme(self) -> QuantizationConfig | None:
        """How weights, activations and caches are rounded; None where a scheme rounds nothing."""
        if not self.quantize:
            return None
        overrides = {pattern: _weights_of(pattern, scheme) for pattern, scheme in self.layers}
        stacks = self.to != "onnx"  # which multiplies by one matrix of integers at a time
        asked = QuantizationConfig.parse(self.quantize)
        if self.learn is not None or self.minutes is not None:
            asked = replace(asked, learn=learning_of(self.learn or "full", self.minutes))
        if asked.learn is not None:
            asked = replace(asked, learn=replace(asked.learn, seed=self.learning_seed))
        return replace(asked, exclude=self.keep, overrides=overrides, stacks=stacks)

    @property
    def bases(self) -> Learning | None:
        """How changes of basis are learned, before anything is rounded; None where they stay as they begin. They pay
        where activations or caches have few bits, whose ranges they level; weights have their own."""
        scheme = self.scheme
        if scheme is None or scheme.learn is None or self.learn in (None, "none") or self.config is None:
            return None
        if self.plan is not None:  # which has its matrices
            return None
        few = [each for each in (scheme.activations, scheme.cache) if each is not None and each.bits < FINE]
        if not few or (scheme.activations is not None and scheme.activations.static):
            return None
        return bases_of(self.minutes, self.learning_seed)

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
        scheme = self.scheme
        if self.to == "onnx" and scheme is not None and scheme.weights is not None and scheme.activations is None:
            found.append(
                f"{self.quantize} leaves activations alone: ONNX Runtime multiplies in floats, and decoding is several "
                "times slower than with -a8"
            )
        rotation = self.config
        if self.plan is not None or (rotation is not None and (rotation.matrices or rotation.overrides)):
            found.append(
                "no recipe.yaml is written: a plan, matrices and settings of single spaces are files and values of "
                "yours; keep them beside the folder"
            )
        recipe: RotationConfig | None = None
        if self.bits is not None and self.plan is None:
            recipe = recipe_of(self.recipe, self.bits, self.to).config
        offline = rotation is not None and rotation.form == "auto" and "R1" in rotation.rotations
        if offline and recipe is not None and recipe.form != "auto":
            found.append(
                f"the recipe has --form {recipe.form}, and your options of rotations take its place with form auto: "
                f"add --form {recipe.form} to keep it"
            )
        elif offline and scheme is not None:
            found.append(
                "form auto folds R1 into the weights where it can, norm scales included; --form online costs two "
                "Hadamards per layer and usually loses less under quantization (spinpass tune measures it)"
            )
        return found

    @property
    def stored_bits(self) -> float | None:
        """How many bits a weight has in the result, at least; None for those of the dtype."""
        scheme = self.scheme
        if self.int4:
            return 4.0
        if scheme is None or scheme.weights is None:
            return None
        return float(scheme.average_bits or scheme.weights.bits)


def _weights_of(pattern: str, scheme: str) -> Weights:
    """Return how a layer's weights are rounded by a scheme. Raises ConfigError where it says more than that."""
    parsed = QuantizationConfig.parse(scheme)
    if parsed.weights is None or parsed != replace(QuantizationConfig(), weights=parsed.weights):
        raise ConfigError(f"--layer {pattern}={scheme}: name weights alone for a layer, for example w8-rtn")
    return parsed.weights

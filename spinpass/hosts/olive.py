"""Olive's pass ``SpinPass``:  HfModel  ->  rotated, certified, quantized  ->  ONNXModel;  needs the extra ``olive``.

Olive finds a pass by a file that says where its module lies, which :func:`write_package_config` makes.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from spinpass.config import Override, RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.evaluation import EvalRequest, Perplexity
from spinpass.folders import export
from spinpass.formats import model_path, read_matrices, staged
from spinpass.graph import HOST
from spinpass.progress import Silent

try:
    from olive.evaluator.metric_result import MetricResult, SubMetricResult
    from olive.evaluator.olive_evaluator import OliveEvaluator
    from olive.evaluator.registry import Registry
    from olive.model import HfModelHandler, ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except ModuleNotFoundError as error:
    raise ExportError(f"the pass of Olive needs {error.name}: pip install 'spinpass[olive]'") from error

_OF_OLIVE = frozenset({"model", "out", "config", "to", "trust_remote_code", "force", "steps", "team"})
"""Arguments of an export that Olive gives, or that mean nothing there."""

_NOTHING = "none"  # is rotated
_PROVIDER = "CPUExecutionProvider"


class SpinPass(Pass):  # type: ignore[misc]  # Olive has no types
    """Rotates a model of transformers, proves that its function is unchanged, and writes it for ONNX Runtime.

    Its parameters are the arguments of :func:`spinpass.folders.export`, under the same names and with the same
    defaults, and ``rotation``, the fields of a :class:`spinpass.RotationConfig`. What lies beside the model in the
    folder (tokenizer, configuration, ``genai_config.json``, ``spinpass.json``) goes with it as additional files.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        """Return what Olive takes for this pass, read off the signature of the export."""
        about = _described(export)
        taken = inspect.signature(export, eval_str=True).parameters
        options = {
            name: PassConfigParam(type_=option.annotation, default_value=option.default, description=about[name])
            for name, option in taken.items()
            if name not in _OF_OLIVE
        }
        options["device"].type_, options["device"].default_value = str, str(HOST)  # JSON has none of torch
        names = ", ".join(field.name for field in fields(RotationConfig))
        rotation = f"What is rotated, as a RotationConfig has it: {names}. {_NOTHING!r} writes the original."
        first = PassConfigParam(type_=dict[str, Any] | str, default_value={}, description=rotation)
        return {"rotation": first} | options

    @classmethod
    def get_config_params(cls, accelerator_spec: Any, config: Any = None, disable_search: Any = False) -> Any:
        """Return what :meth:`Pass.get_config_params` returns. Raises ConfigError for an option that there is not, which
        Olive would leave out."""
        known = cls.default_config(accelerator_spec)
        unknown = next((name for name in config or {} if name not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"SpinPass has no option {unknown}: {meant}")
        return super().get_config_params(accelerator_spec, config, disable_search)

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: Any) -> bool:
        """Return whether the options are valid. Raises ConfigError where the file is to be for another provider: its
        kernels would not be those that it was tried with."""
        asked = accelerator_spec.execution_provider
        if asked not in (None, _PROVIDER):
            raise ConfigError(
                f"SpinPass tries its file with {_PROVIDER}, and Olive's target asks for {asked}: name that provider in "
                "the target's accelerators"
            )
        return bool(super().validate_config(config, accelerator_spec))

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        """Export the model into the folder that Olive names.

        Raises:
            ConfigError: the model is none of transformers, or an option means nothing.
            ExportError, RefusedError, VerificationError: :func:`spinpass.folders.export` raises them.
        """
        source, folder = _source_of(model), Path(output_model_path).with_suffix("")
        options = {name: value for name, value in config.model_dump().items() if name != "rotation"}
        options["trust_remote_code"] = bool(model.get_load_kwargs().get("trust_remote_code"))
        written = export(source, folder, _rotation_of(config.rotation), **options)
        model_files = {path.name for path in written.report.files}
        beside = [str(folder / name) for name in sorted({*written.files} - model_files)]
        return ONNXModelHandler(
            model_path=str(folder),
            onnx_file_name=model_path(folder).name,
            model_attributes={**(model.model_attributes or {}), "additional_files": beside},
        )


@Registry.register()
class SpinEvaluator(OliveEvaluator):  # type: ignore[misc]  # as above
    """Scores what Olive holds on text, beside the metrics that Olive's own evaluator of its kind measures.

    An evaluator of the type ``SpinEvaluator``, whose ``user_script`` imports this module. It adds ``text-perplexity``.

    Args:
        text: the file of a UTF-8 text; Python's help texts where it is None.
        windows: how many windows of 512 tokens of the text are scored, at most.
    """

    def __init__(self, text: str | None = None, windows: int = 16, **others: Any) -> None:
        super().__init__(**others)
        self.text, self.windows = None if text is None else Path(text), windows

    def evaluate(self, model: Any, metrics: Any, device: Any = None, execution_providers: Any = None) -> Any:
        """Return Olive's results, and the perplexity of an HfModel or of an ONNXModel that :class:`SpinPass` wrote.

        It is scored on the CPU. Raises ConfigError and ExportError: the model or the text cannot be read, or the text
        is too short.
        """
        of_olive: Any = Registry.get(str(model.framework))
        found = of_olive().evaluate(model, metrics, device, execution_providers).root if metrics else {}
        source = str(Path(model.model_path).parent) if isinstance(model, ONNXModelHandler) else _source_of(model)
        scored = EvalRequest(source, self.text, windows=self.windows).run(Silent()).main
        assert isinstance(scored, Perplexity)  # nothing is compared
        result = SubMetricResult(value=scored.value, priority=-1, higher_is_better=False)
        return MetricResult.model_validate({**found, "text-perplexity": result})


def write_package_config(path: str | Path) -> Path:
    """Write the file in which Olive finds this pass beside all of its own, and return its path.

    Raises ExportError where it cannot be written.
    """
    listed = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    listed["passes"][SpinPass.__name__] = {
        "module_path": f"{SpinPass.__module__}.{SpinPass.__name__}",
        "supported_providers": [_PROVIDER],
        "supported_accelerators": ["cpu"],
        "supported_precisions": ["*"],
    }
    path = Path(path)
    with staged(path.parent) as staging:
        (staging / path.name).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return path


def _source_of(model: Any) -> str:
    """Return the folder or the name on the hub of Olive's model. Raises ConfigError where that is not all of it."""
    if not isinstance(model, HfModelHandler):
        raise ConfigError(f"SpinPass takes an HfModel, and this is an {type(model).__name__.removesuffix('Handler')}")
    if model.adapter_path:
        raise ConfigError(f"{model.adapter_path} is an adapter beside the model: run MergeAdapterWeights first")
    if model.test_model_config:
        raise ConfigError("SpinPass exports a checkpoint, and a test model has none: leave --test out")
    return str(model.model_name_or_path)


def _rotation_of(given: Mapping[str, Any] | str) -> RotationConfig | None:
    """Return what is rotated, None for nothing. Raises ConfigError where that means nothing."""
    if given == _NOTHING:
        return None
    if isinstance(given, str):
        raise ConfigError(f"rotation={given!r}: give the fields of a RotationConfig, or {_NOTHING!r}")
    known = [field.name for field in fields(RotationConfig)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"a rotation has no {unknown[0]!r}: it has {', '.join(known)}")
    made: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
    if "overrides" in made:
        made["overrides"] = {name: Override(**own) for name, own in made["overrides"].items()}
    if "matrices" in made:
        made["matrices"] = read_matrices(Path(made["matrices"]))
    return RotationConfig(**made)


def _described(function: Callable[..., Any]) -> dict[str, str]:
    """Return what a docstring says of each argument, in one line."""
    listed = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", listed, re.M)
    return {name: " ".join(text.split()) for name, text in found}

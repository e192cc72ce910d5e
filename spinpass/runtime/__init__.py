"""Exported files run, and text out of them: sessions of three runtimes, and one decoding loop over a graph of any.

No runtime is imported before something of it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .conversation import Conversation, chat_tokens, check_characters, check_template
from .decoder import OrtDecoder
from .file_session import DecoderSession, FileSession
from .genai_session import GENAI_CONFIG, GenaiModel, genai_tokens, special_tokens
from .model_folder import ModelFolder
from .onnx_graph import CPU, DecoderGraph, State
from .opened import open_decoder
from .openvino_decoder import OpenVINODecoder
from .openvino_session import CompiledModel, generate_openvino, import_openvino, openvino_reason
from .ort_model import GeneratedTokens, OrtModel, Past
from .penalties import Penalties
from .sampling import Sampling
from .search import SearchOptions
from .text_pieces import Pieces, StopText
from .trial import Answer, Turns, continued, outputs

if TYPE_CHECKING:
    from .executorch_session import PteMethod
    from .onnx_session import DTYPES, NoKernelError, from_ort, open_session, run_session, to_ort
    from .pte_decoder import PteDecoder

__all__ = [
    "CPU",
    "DTYPES",
    "GENAI_CONFIG",
    "Answer",
    "CompiledModel",
    "Conversation",
    "DecoderGraph",
    "DecoderSession",
    "FileSession",
    "GenaiModel",
    "GeneratedTokens",
    "ModelFolder",
    "NoKernelError",
    "OpenVINODecoder",
    "OrtDecoder",
    "OrtModel",
    "Past",
    "Penalties",
    "Pieces",
    "PteDecoder",
    "PteMethod",
    "Sampling",
    "SearchOptions",
    "State",
    "StopText",
    "Turns",
    "chat_tokens",
    "check_characters",
    "check_template",
    "continued",
    "from_ort",
    "genai_tokens",
    "generate_openvino",
    "import_openvino",
    "open_decoder",
    "open_session",
    "openvino_reason",
    "outputs",
    "run_session",
    "special_tokens",
    "to_ort",
]

_SESSION = ("DTYPES", "NoKernelError", "from_ort", "open_session", "run_session", "to_ort")
_LAZY = dict.fromkeys(_SESSION, "onnx_session") | {"PteMethod": "executorch_session", "PteDecoder": "pte_decoder"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)

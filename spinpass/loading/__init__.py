"""Whatever a user names, a folder, a name on the hub, a GGUF file or a program, becomes a program."""

from .dequantize import dequantize_checkpoint, quantized_checkpoint
from .files import SourceFiles
from .models import Companions, LoadedModel, load_model
from .sources import locate
from .static_cache import export_static_cache
from .tensors import LoadingReport

__all__ = [
    "Companions",
    "LoadedModel",
    "LoadingReport",
    "SourceFiles",
    "dequantize_checkpoint",
    "export_static_cache",
    "load_model",
    "locate",
    "quantized_checkpoint",
]

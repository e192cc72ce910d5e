"""An exported program becomes a ``.pte`` file that stock ExecuTorch runs; needs the extra ``executorch``."""

from .writer import PteReport, export

__all__ = ["PteReport", "export"]

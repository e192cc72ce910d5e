"""An exported program becomes an OpenVINO model; writing needs the extra ``openvino``, importing this package does not."""

from .writer import OpenVINOReport, export

__all__ = ["OpenVINOReport", "export"]

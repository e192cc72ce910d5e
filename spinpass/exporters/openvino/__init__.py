"""An exported program becomes an OpenVINO model; writing it needs the extra ``openvino``, importing this does not."""

from .writer import OpenVINOReport, export

__all__ = ["OpenVINOReport", "export"]

"""A report people look at: what rotation does to a program's activations, its quantization error and its perplexity."""

from .comparison import ComparedReports, SavedReport, compare_reports, write_comparison
from .measure import ReportRequest
from .page import save_report, write_page
from .report import Report

__all__ = [
    "ComparedReports",
    "Report",
    "ReportRequest",
    "SavedReport",
    "compare_reports",
    "save_report",
    "write_comparison",
    "write_page",
]

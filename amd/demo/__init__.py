"""`amd demo`: from nothing to a table that says what distillation is worth, on a laptop."""

from amd.demo.report import DemoReport, markdown
from amd.demo.run import DemoFailed, run_demo

__all__ = ["DemoFailed", "DemoReport", "markdown", "run_demo"]

"""`amd demo`: train a teacher on a laptop, and compare students trained with and without distillation."""

from amd.demo.report import DemoReport, markdown
from amd.demo.run import DemoFailed, run_demo

__all__ = ["DemoFailed", "DemoReport", "markdown", "run_demo"]

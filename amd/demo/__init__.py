"""`amd demo`: train a teacher and its students on a laptop and tabulate what distillation adds."""

from amd.demo.report import DemoReport, markdown
from amd.demo.run import DemoFailed, run_demo

__all__ = ["DemoFailed", "DemoReport", "markdown", "run_demo"]

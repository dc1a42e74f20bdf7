"""`amd parity DIR`: reproduce reference values recorded from the official code, each within a tolerance.

A folder contains an AMD case (`amd_meta.json`), an MAE case (`mae_meta.json`), smaller golden files, or all of them.
The command compares all features, targets, losses, gradients and gradient norms, in float32 and float64; optimizer
steps; position tables, schedules, parameter groups with layer decay, masks, frame sampling, crops, fine-tuned heads,
and multi-view tests.

A tensor that no check reads is a failure, as is a file or tensor that the layout requires but the folder lacks. Unknown
JSON files and unknown keys of the meta files are reported as notes. Unused tensors of a state (the classifier head of
a teacher, norms of generators) are checked by name and shape only, since they affect no result.
"""

from __future__ import annotations

from pathlib import Path

from amd.config import ConfigError
from amd.parity import amd_replay, finetune_case, mae_case, pieces
from amd.parity.report import ParityReport, ParityRow

__all__ = ["ParityReport", "ParityRow", "run"]


def run(folder: str) -> ParityReport:
    """Replay a local golden folder. Raises ConfigError if the folder contains no golden files."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError([f"{folder}: no such folder; pass one that contains amd_meta.json or mae_meta.json"])
    names = {file.name for file in path.iterdir() if file.is_file()}
    report = ParityReport(str(path))
    known: set[str] = set()
    for case in (amd_replay, mae_case):
        files = {case.META, *(f"{name}.safetensors" for name in case.FILES)}
        known |= files
        if names & files:  # a case with a missing file is a failure, not an absent case
            pieces.guarded(case.META, case.replay, path, report)
    for name, check in pieces.CHECKS.items():
        known.add(name)
        if name in names:
            pieces.guarded(name, check, path, report)
    known.add(finetune_case.FILE)
    if finetune_case.FILE in names:
        pieces.guarded(finetune_case.FILE, finetune_case.check, path, report)
    for name in sorted(names - known):
        if name.endswith(".safetensors"):
            report.fail(name, "file", "cannot be checked: unknown file in this layout")
        elif name.endswith(".json"):
            report.note(name, "file", "not checked by this command")
    if not report.rows or all(row.verdict == "note" for row in report.rows):
        raise ConfigError(
            [f"{folder}: contains no golden files; pass a folder that contains amd_meta.json or mae_meta.json"]
        )
    return report

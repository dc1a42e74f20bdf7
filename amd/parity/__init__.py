"""`amd parity DIR`: numbers of the official code, reproduced with our own modules, each against its tolerance.

A folder holds an AMD case (`amd_meta.json`), a MAE case (`mae_meta.json`), smaller golden files, or all of them. What
is compared: every feature, target, loss, gradient and gradient norm, in float32 and float64; the optimiser's steps;
position tables, schedules, parameter groups with layer decay, masks, frame sampling, crops, fine-tuned heads, views of
a test.

Rules. A tensor that nobody checks is a failure, in a known file or an unknown one. A file or a tensor that the layout
names and the folder does not have is a failure. JSON files that no check knows are named in a note, as are unknown
words in the meta files. What a state holds for no purpose (a
classifier's head in a teacher, norms of generators) is checked by name and shape alone: it decides no number.
Knows nothing of the command line.
"""

from __future__ import annotations

from pathlib import Path

from amd.config import ConfigError
from amd.parity import amd_replay, finetune_case, mae_case, pieces
from amd.parity.report import ParityReport, Row

__all__ = ["ParityReport", "Row", "run"]


def run(folder: str) -> ParityReport:
    """Replay a local golden folder. Raises ConfigError when it is none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError([f"{folder}: no such folder; give one with amd_meta.json or mae_meta.json in it"])
    names = {file.name for file in path.iterdir() if file.is_file()}
    report = ParityReport(str(path))
    known: set[str] = set()
    for case in (amd_replay, mae_case):
        files = {case.META, *(f"{name}.safetensors" for name in case.FILES)}
        known |= files
        if names & files:  # a case with a file missing is a failure, not an absent case
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
            report.fail(name, "file", "cannot be checked: no known file of this layout")
        elif name.endswith(".json"):
            report.note(name, "file", "not part of this command")
    if not report.rows or all(row.verdict == "note" for row in report.rows):
        raise ConfigError([f"{folder}: no golden files in it; give a folder with amd_meta.json or mae_meta.json"])
    return report

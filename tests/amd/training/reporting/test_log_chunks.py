"""A rank's output, including output from C libraries and child processes, is stored while the rank is running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from amd.storage import join, listdir, read_bytes
from amd.training.reporting.log_chunks import rank_log, rank_log_folder
from tests.support.processes import run_ranks


def print_in_two_runs(run: str, rank: int, output: str) -> None:
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        for number in range(2):
            with rank_log(run, rank, 2):
                print(f"printed in run {number}", flush=True)
                os.write(2, b"written by a library\n")
                subprocess.run([sys.executable, "-c", "print('printed by a child')"], check=True)
        print("printed afterwards", flush=True)


def stored_log(run: str, rank: int) -> str:
    folder = rank_log_folder(run, rank)
    return b"".join(read_bytes(join(folder, name)) for name in listdir(folder)).decode()


def test_each_rank_has_one_log_with_its_output_from_all_runs(tmp_path: Path) -> None:
    outputs = [str(tmp_path / f"output-{rank}") for rank in range(2)]
    assert run_ranks(print_in_two_runs, [(str(tmp_path), rank, outputs[rank]) for rank in range(2)]) == [0, 0]
    for rank, output in enumerate(outputs):
        printed = Path(output).read_text()
        assert printed.count("printed by a child\n") == 2
        assert printed.endswith("printed afterwards\n")
        lines = stored_log(str(tmp_path), rank).splitlines()
        assert [line for line in lines if f"rank {rank} of 2 on" in line] == [lines[0], lines[4]]
        assert {*lines[1:4]} == {"printed in run 0", "written by a library", "printed by a child"}
        assert {*lines[5:]} == {"printed in run 1", "written by a library", "printed by a child"}

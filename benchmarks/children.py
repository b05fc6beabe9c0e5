"""Run commands as children and measure what they cost: wall time and peak resident memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds`: wall time; `peak_bytes`: ru_maxrss of the child, mapped file pages included."""

    seconds: float
    peak_bytes: int


def run(command: Sequence[str], folder: Path) -> Cost:
    """Raises RuntimeError where the command fails."""
    with (folder / "output.txt").open("w+") as output:
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {output.read()[-500:]}")
    return Cost(seconds, usage.ru_maxrss * 1024)


def interleaved(commands: Mapping[str, Sequence[str]], folder: Path, rounds: int, clean: Sequence[str] = ()) -> dict[str, Cost]:
    """The median cost of each command over rounds in which all take turns; `clean`: globs removed before each run."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            for pattern in clean:
                subprocess.run(["rm", "-rf", *map(str, folder.glob(pattern))], check=True)
            costs[name].append(run(command, folder))
    return {
        name: Cost(statistics.median(cost.seconds for cost in seen), max(cost.peak_bytes for cost in seen))
        for name, seen in costs.items()
    }

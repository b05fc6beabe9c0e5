"""What the machine is, and what it does while something is measured: clocks, throttling, load, strangers on the GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from repdeploy.measurements import Watched
from repdeploy.versions import tool_versions

PERIOD = 0.5
"""Seconds between two looks."""
CPUS = Path("/sys/devices/system/cpu")
THROTTLED = ("core_throttle_count", "package_throttle_count")
NVIDIA = "nvidia-smi"
GPU_LIMITS = {
    0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}  # fmt: skip
"""Bits of clocks_event_reasons.active that slow the device down. Source: NVML API reference, nvmlClocksEventReasons."""


def cores() -> int:
    """That this process may use: what it is bound to, and no more than its control group grants."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return bound
    return bound if quota == "max" else max(1, min(bound, int(int(quota) / int(period))))


def environment(threads: int) -> dict[str, str]:
    """The conditions that every row shares."""
    found = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(cores()),
        "threads": str(threads),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["cpu features"] = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name(0)
            found["cuda"] = str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
    if driver := _asked("--query-gpu=driver_version"):
        found["gpu driver"] = driver[0]
    return {**found, **tool_versions()}


@dataclass(slots=True)
class Watch:
    """Looks at the machine in a thread of its own while something is measured."""

    device: str
    _clocks: list[float] = field(default_factory=list)
    _limits: set[str] = field(default_factory=set)
    _foreign: set[str] = field(default_factory=set)
    _before: tuple[int, int] = (0, 0)
    _busy: tuple[float, float] | None = None
    _ours: float = 0.0
    _child: int = 0

    @contextmanager
    def on(self, child: int) -> Iterator[None]:
        """While a child process measures."""
        self._child, self._before, self._busy = child, (_throttle_count(), _group_throttled()), _busy()
        over = threading.Event()
        thread = threading.Thread(target=self._look, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def seen(self) -> Watched:
        """So far, and forget it: rows of one child are told apart."""
        throttled = sorted(self._limits)
        count, group = _throttle_count(), _group_throttled()
        if count > self._before[0]:
            throttled.append(f"{count - self._before[0]} thermal throttling events")
        if group > self._before[1]:
            throttled.append(f"the control group's CPU quota was used up {group - self._before[1]} times")
        clock = (min(self._clocks), max(self._clocks)) if self._clocks else ()
        result = Watched(clock, tuple(throttled), self._foreign_load(), tuple(sorted(self._foreign)))
        self._clocks, self._limits, self._foreign, self._before = [], set(), set(), (count, group)
        return result

    def _foreign_load(self) -> float | None:
        """What others took of the cores since the last row, as a share; None where the system does not tell."""
        before, now = self._busy, _busy()
        ours = _cpu_seconds(self._child)
        if before is None or now is None or ours is None:
            return None
        used, passed = now[0] - before[0], now[1] - before[1]
        self._busy, mine, self._ours = now, ours - self._ours, ours
        return max(0.0, (used - mine) / passed) if passed > 0 else None

    def _look(self, over: threading.Event) -> None:
        while True:
            if self.device == "cuda":
                self._look_at_gpu()
            else:
                self._clocks += _clocks()
            if over.wait(PERIOD):
                return

    def _look_at_gpu(self) -> None:
        for line in _asked("--query-gpu=clocks.sm,clocks_event_reasons.active"):
            clock, _, reasons = line.partition(",")
            try:
                self._clocks.append(float(clock))
                active = int(reasons.strip(), 16)
            except ValueError:  # a device that does not tell
                continue
            self._limits |= {words for bit, words in GPU_LIMITS.items() if active & bit}
        for line in _asked("--query-compute-apps=pid,process_name"):
            number, _, name = line.partition(",")
            if number.strip().isdigit() and int(number) not in (self._child, os.getpid()):
                self._foreign.add(f"{name.strip()} ({number.strip()})")


def _clocks() -> list[float]:
    """MHz of every core, where the system tells."""
    found = []
    for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue
    return found


def _throttle_count() -> int:
    total = 0
    for name in THROTTLED:
        for path in CPUS.glob(f"cpu[0-9]*/thermal_throttle/{name}"):
            try:
                total += int(path.read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue
    return total


def _group_throttled() -> int:
    try:
        lines = Path("/sys/fs/cgroup/cpu.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("nr_throttled")), 0)


def _busy() -> tuple[float, float] | None:
    """Seconds that all cores were busy, and that passed on all of them, since the start of the machine."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        ticks = [int(word) for word in first.split()[1:9]]
    except (OSError, ValueError):
        return None
    second = os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / second, sum(ticks) / second


def _cpu_seconds(process: int) -> float | None:
    try:
        words = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _asked(query: str) -> list[str]:
    """What NVIDIA's tool answers, line by line; nothing where it is not there."""
    if shutil.which(NVIDIA) is None:
        return []
    command = [NVIDIA, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def busy_now() -> float:
    """The share of all cores that is in use at this moment, over a tenth of a second; 0 where the system does not tell."""
    before = _busy()
    time.sleep(0.1)
    after = _busy()
    if before is None or after is None or after[1] <= before[1]:
        return 0.0
    return (after[0] - before[0]) / (after[1] - before[1])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")

"""TensorRT: the build script that a target machine needs, and the engine itself where this machine can build it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from repdeploy.bundle import write_text
from repdeploy.errors import BackendFailed
from repdeploy.gates import PRECISION_BUDGETS

SCRIPT = "build_engine.py"
BATCHES = (1, 4, 16)
"""Smallest, optimal and largest batch of a dynamic engine's profile."""


Shapes = Mapping[str, tuple[int, ...]]
"""Of every input by name, without the batch."""


def write_build_script(folder: Path, onnx: str, shapes: Shapes, batches: Sequence[int], precision: str) -> Path:
    """A self-contained script beside the ONNX: build, run, compare. Needs TensorRT and cuda-python, not this package."""
    text = files("repdeploy.exporters").joinpath("build_engine.py.in").read_text(encoding="utf-8")
    values = {
        "ONNX": onnx,
        "BUDGET": f"{PRECISION_BUDGETS[precision]:g}",
        "SHAPES": str(dict(shapes)),
        "PRECISION": precision,
        "BATCHES": ", ".join(map(str, batches)),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    write_text(folder / SCRIPT, text.rstrip("\n"))
    return folder / SCRIPT


def trtexec_line(onnx: str, shapes: Shapes, batches: Sequence[int]) -> str:
    """The same build with NVIDIA's own tool."""
    options = " ".join(
        f"--{bound}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in shapes.items())
        for bound, batch in zip(("min", "opt", "max"), batches, strict=True)
    )
    return f"trtexec --onnx={onnx} {options} --stronglyTyped --noTF32 --profilingVerbosity=detailed --saveEngine=model.plan"


def missing() -> tuple[str, str] | None:
    """What an engine needs that this machine lacks, and how to get it; None where one can be built."""
    lacking = []
    if importlib.util.find_spec("tensorrt") is None:
        lacking.append("TensorRT is not installed (looked for the Python package tensorrt)")
    if not has_gpu():
        lacking.append("no NVIDIA GPU answers (looked for a CUDA device)")
    if not lacking:
        return None
    return "; ".join(lacking), f"copy the bundle to the target machine and run: python {SCRIPT}"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def build_engine(folder: Path) -> Path:
    """Run the build script here. Returns the plan; raises BackendFailed with TensorRT's own words."""
    before = set(folder.glob("*.plan"))
    run = subprocess.run([sys.executable, SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = (run.stdout + run.stderr).strip().splitlines()[-3:]
        raise BackendFailed("TensorRT could not build a correct engine: " + " / ".join(said))
    built = set(folder.glob("*.plan")) - before
    return next(iter(built)) if built else max(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime_ns)

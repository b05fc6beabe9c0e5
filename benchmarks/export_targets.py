"""Every sample model and reference network, exported in every precision: what gate 4 measured, and whether it can be repeated.

usage: python -m benchmarks.export_targets [NAME ...]        (reference networks only where shared/reference is there)

Per network: the worst relative error of fp32 in onnxruntime (batch 1, 2, 5) and, on the reference cases' own images, against
the official output; of fp16 and bf16 executed by their types; layers that stay in float32 because float16 cannot hold them;
whether a second export from a second conversion is the same file byte for byte; and whether anything written holds a path of
this machine.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import repdeploy
from repdeploy.errors import RepDeployError
from repdeploy.records import Precision
from repdeploy.runtimes.onnx_runtime import OnnxSession
from sample_models.samples import SAMPLES
from tests.conftest import REFERENCE
from tests.golden.cases import Case

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
HERE = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Subject:
    name: str
    checkpoint: Path
    settings: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    case: Case | None = None


def subjects(only: list[str]) -> Iterator[Subject]:
    for name, sample in SAMPLES.items():
        if name != "repconv":  # a network of no known kind: it is exported through --model
            side = sample.side
            yield Subject(f"sample {name}", sample.checkpoint(name), sample.options, (1, 1, side, side))
    for meta in sorted(REFERENCE.glob("*/*/meta.json")) if REFERENCE.is_dir() else ():
        case = Case(meta.parent)
        name = case.folder.name
        if case.folder.parent.name != "graph" and not name.startswith(("block_", "stem_", "largebase", "wrn_block")):
            shape = tuple(case.array("input").shape)
            yield Subject(f"{case.folder.parent.name}/{name}", case.checkpoint, case.settings, shape, case)


def paths_in(folder: Path, scratch: Path) -> list[str]:
    """Files of a bundle that hold a path of this machine."""
    found = []
    for path in sorted(folder.iterdir()):
        contents = [path.read_bytes()]
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        if any(text.encode() in content for content in contents for text in (HERE, str(scratch))):
            found.append(path.name)
    return found


def measured(subject: Subject, scratch: Path) -> str:
    artifacts = []
    for run in ("a", "b"):
        bundle = scratch / f"{run}.repdeploy"
        repdeploy.convert(
            subject.checkpoint, output=bundle, set=subject.settings, input_shape=subject.input_shape, gates="all", force=True
        )
        artifacts.append([repdeploy.export(bundle, precision=precision).artifacts[0] for precision in PRECISIONS])
    cells = [max(check.error for check in first.checks if check.budget) for first in artifacts[0]]
    same = all(one.sha256 == two.sha256 for one, two in zip(*artifacts, strict=True))
    official = ""
    if subject.case is not None:
        x, wanted = subject.case.array("input").numpy(), subject.case.array("output").numpy()
        got = OnnxSession(scratch / "a.repdeploy" / "model.fp32.onnx").run(x)
        official = f"{np.abs(got - wanted).max() / np.abs(wanted).max():.1e}"
    held = [layer for layer in artifacts[0][1].wide if "float16 ends" in layer.reason or "subnormal" in layer.reason]
    paths = ", ".join(paths_in(scratch / "a.repdeploy", scratch)) or "none"
    errors = "".join(f"{cell:>10.1e}" for cell in cells)
    return f"{errors}{official:>10}{len(held):>6}{'yes' if same else 'NO':>6}  {paths}"


def main() -> None:
    torch.set_num_threads(2)
    only = sys.argv[1:]
    print(f"{'network':<36}{'fp32':>10}{'fp16':>10}{'bf16':>10}{'official':>10}{'held':>6}{'same':>6}  paths", flush=True)
    for subject in subjects(only):
        if only and not any(word in subject.name for word in only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                print(f"{subject.name:<36}{measured(subject, Path(scratch))}", flush=True)
            except RepDeployError as reason:
                print(f"{subject.name:<36}{type(reason).__name__}: {reason}", flush=True)


if __name__ == "__main__":
    main()

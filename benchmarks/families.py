"""Every reference case, converted, beside the official converter: the worst absolute error per family, and its file's lines.

usage: python -m benchmarks.families            (needs shared/reference beside the project)

Networks run through the exported ONNX in onnxruntime, blocks through their fused convolution, both in float32; the error is the
largest absolute one against the official training-time output in float64. `official`: the same of the paper's own converter.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import repdeploy
from repdeploy.errors import RepDeployError
from repdeploy.runtimes.onnx_runtime import OnnxSession
from tests.conftest import REFERENCE
from tests.golden.cases import Case
from tests.golden.test_blocks import activation, stated

WRONG = 1e-2
"""An official error above this is no rounding: the converter is wrong."""


def network_error(case: Case, weights: str, output: str, folder: Path) -> tuple[str, float]:
    """(family, largest absolute error) of the exported network."""
    x = case.array("input").numpy()
    manifest = repdeploy.convert(
        case.checkpoint, output=folder / "n.repdeploy", weights=weights, set=case.settings, input_shape=x.shape
    ).manifest
    repdeploy.export(folder / "n.repdeploy")
    got = OnnxSession(folder / "n.repdeploy" / "model.fp32.onnx").run(x)
    return manifest.family, float(np.abs(got - case.array(output).numpy()).max())


def block_error(case: Case, folder: Path) -> tuple[str, float]:
    """(family, largest absolute error) of the fused convolution."""
    family, arguments = case.folder.parent.name, case.meta["constructor"]
    repdeploy.convert(case.checkpoint, family=family, output=folder / "b.repdeploy", set=stated(case))
    bias, weight = load_file(folder / "b.repdeploy" / "weights.safetensors").values()
    bias, weight = (bias, weight) if weight.dim() == 4 else (weight, bias)
    x, stride, padding = case.array("input"), arguments.get("stride", 1), arguments.get("padding", 0)
    got = activation(case, F.conv2d(x, weight, bias, stride, padding, 1, x.shape[1] // weight.shape[1]))
    return family, float((got.double() - case.array("output")).abs().max())


def lines(family: str) -> int:
    return len(inspect.getsource(import_module(f"repdeploy_plugins.{family}")).splitlines())


def main() -> None:
    if not REFERENCE.is_dir():
        sys.exit(f"no reference cases at {REFERENCE.name}: they lie beside the project where they are needed")
    torch.set_num_threads(2)
    worst: dict[str, list[tuple[float, float, str]]] = {}
    skipped: list[str] = []
    for meta in sorted(REFERENCE.glob("*/*/meta.json")):
        case = Case(meta.parent)
        name = f"{case.folder.parent.name}/{case.folder.name}"
        if case.folder.parent.name == "graph" or case.folder.name == "wrn_block":
            continue
        official = float(case.meta["official_fused_max_abs_err"])
        for weights, output in case.outputs():
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    is_block = case.folder.name.startswith(("block_", "stem_"))
                    folder = Path(scratch)
                    found = block_error(case, folder) if is_block else network_error(case, weights, output, folder)
                except RepDeployError as reason:
                    skipped.append(f"{name}: {str(reason)[:80]}")
                    continue
            family, error = found
            worst.setdefault(family, []).append((error, official, name if weights == "model" else f"{name} (EMA)"))
            print(f"{name:<36} {weights:<6} {error:.1e}   official {official:.1e}", flush=True)
    columns = f"{'case':<36}{'official there':>15}{'its worst':>11}{'wrong':>7}{'lines':>7}"
    print()
    print(f"{'family':<12}{'cases':>6}{'worst':>10}  {columns}")
    for family, rows in sorted(worst.items()):
        error, official, name = max(rows)
        right = max((value for _, value, _ in rows if value < WRONG), default=0.0)
        wrong = sum(value >= WRONG for _, value, _ in rows)
        shown = f"{official:.1e}" if official < WRONG else "wrong"
        print(f"{family:<12}{len(rows):>6}{error:>10.1e}  {name:<36}{shown:>15}{right:>11.1e}{wrong:>7}{lines(family):>7}")
    for line in skipped:
        print(f"not converted: {line}")


if __name__ == "__main__":
    main()

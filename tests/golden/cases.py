"""The reference cases: the papers' own checkpoints with the outputs of their own training-time code, in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import REFERENCE


@dataclass(frozen=True, slots=True)
class Case:
    folder: Path

    @property
    def meta(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        return content

    @property
    def checkpoint(self) -> Path:
        return next(iter(sorted(self.folder.glob("checkpoint.*"))))

    def array(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def outputs(self) -> list[tuple[str, str]]:
        """(weights, name of the output) for the model's own weights and, where they are recorded, the EMA weights."""
        known = [("model", "output"), ("ema", "output_ema")]
        return [(weights, output) for weights, output in known if (self.folder / f"{output}.npy").exists()]

    @property
    def settings(self) -> tuple[str, ...]:
        """What a user has to state, as --set takes it (hints.json)."""
        hints: dict[str, list[str]] = json.loads((REFERENCE / "hints.json").read_text())
        return tuple(hints.get(f"{self.folder.parent.name}/{self.folder.name}", [])[1::2])

    @property
    def exactness(self) -> float:
        """How far float64 formulas on the stored tensors may be from the official float64 output, relative to its largest.

        OREPA's own weight generation rounds in float32 (its sheet, pitfall 8).
        """
        return 1e-6 if self.folder.parent.name == "orepa" else 1e-12

    @property
    def bound(self) -> float:
        """check-reference's: 6x the float32 error of a float64 fusion, plus 5e-7 of the largest output."""
        meta = self.meta
        base = meta.get("float64_fused_float32_run_max_abs_err") or meta.get("train_float32_max_abs_err") or 0.0
        return 6 * float(base) + 5e-7 * float(self.array("output").abs().max())


def cases(*patterns: str) -> list[Any]:
    """Parameters for the cases that match; one that says why it is skipped where the references are not there."""
    if not REFERENCE.is_dir():
        reason = "the reference checkpoints (shared/reference) are not beside this checkout"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-references")]
    found = sorted(path for pattern in patterns for path in REFERENCE.glob(pattern) if (path / "meta.json").exists())
    assert found, patterns
    return [pytest.param(Case(path), id=f"{path.parent.name}/{path.name}") for path in found]

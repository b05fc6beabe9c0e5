"""What all tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
"""The papers' own checkpoints and outputs, where they lie beside the project."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a device say why they are skipped where there is none."""
    import torch

    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch"))


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of known width, and nothing that changes between machines."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> list[str]:
    """Every file below a folder, so that a test can say that nothing was left behind."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

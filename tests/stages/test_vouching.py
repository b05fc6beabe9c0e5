"""Compiled files are loaded only where a manifest vouches for them, and measured where there is no torch."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import repdeploy
from repdeploy.bundle import Bundle
from repdeploy.errors import UsageError
from repdeploy.vouching import compiled_files, require_vouched
from tests.networks import repvgg, save
from tests.standins import install

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = f"""
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name == "torch" else found(name, path, target)
sys.path.insert(0, {str(ROOT)!r})
from tests.standins import install

install(None, "11.4")
"""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle with an engine, in a folder of its own."""
    install(monkeypatch, "11.4")
    repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), output=tmp_path / "a.repdeploy", input_shape="1x3x33x31")
    repdeploy.export(tmp_path / "a.repdeploy", trt=True, batches=(1, 2, 4))
    return tmp_path / "a.repdeploy"


def plan_of(bundle: Path) -> Path:
    (plan,) = bundle.glob("*.plan")
    return plan


def without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return subprocess.run(
        [sys.executable, "-m", "repdeploy", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("by_path", [False, True])
def test_a_bundle_with_its_engine_is_measured_without_torch(built: Path, tmp_path: Path, by_path: bool) -> None:
    subject = str(plan_of(built)) if by_path else str(built)
    answer = without_torch(tmp_path, "bench", subject, "--device", "cuda", "-b", "2", "--seconds", "0.1", "--json")
    assert answer.returncode == 0, answer.stderr
    (row,) = json.loads(answer.stdout)["rows"]
    assert row["runtime"] == "tensorrt"
    (timing,) = row["timings"]
    assert timing["network"] == ("file" if by_path else "deploy")
    assert timing["precision"] == "fp32"
    assert timing["batch"] == 2


def test_a_batch_outside_the_profile_is_a_row_that_says_so(built: Path, tmp_path: Path) -> None:
    answer = without_torch(
        tmp_path, "bench", str(built), "--device", "cuda", "-b", "9", "-b", "1", "--seconds", "0.1", "--json"
    )
    assert answer.returncode == 0, answer.stderr
    rows = {row["batch"]: row for row in json.loads(answer.stdout)["rows"]}
    assert "takes input from 1x3x33x31 to 4x3x33x31" in rows[9]["missing"]
    assert rows[1]["timings"]


def test_a_strangers_plan_is_not_loaded(built: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.plan"
    stranger.write_bytes(plan_of(built).read_bytes())
    with pytest.raises(UsageError, match=r"no manifest vouches for stranger\.plan") as caught:
        repdeploy.bench(stranger, device="cuda")
    assert "--trust-engine" in caught.value.hint
    with pytest.raises(UsageError, match="does not say its image size"):
        repdeploy.bench(stranger, device="cuda", trust_engine=True)
    answer = without_torch(
        tmp_path, "bench", "stranger.plan", "--device", "cuda", "-b", "1", "--seconds", "0.1", "--input-shape", "1x3x33x31",
        "--trust-engine", "--json",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


def test_a_changed_plan_is_vouched_for_no_more(built: Path) -> None:
    plan = plan_of(built)
    assert require_vouched(plan, trusted=False).precision == "fp32"
    plan.write_bytes(plan.read_bytes() + b"x")
    assert "tensorrt" not in compiled_files(Bundle(built))
    with pytest.raises(UsageError, match="no manifest vouches"):
        require_vouched(plan, trusted=False)


def test_what_the_build_script_made_and_checked_is_vouched_for(built: Path) -> None:
    """The record names the engine's hash, the graph's, and the error within its budget."""
    plan_of(built).unlink()
    opened = Bundle(built)  # as it left for the target: with the graph alone
    only_graph = tuple(item for item in opened.manifest.artifacts if item.kind == "onnx")
    opened.write_manifest(replace(opened.manifest, artifacts=only_graph))
    with pytest.raises(SystemExit):
        runpy.run_path(str(built / "build_engine.py"), run_name="__main__")
    plan = plan_of(built)
    assert compiled_files(Bundle(built))["tensorrt"].path == plan
    record = plan.with_name(plan.name + ".json")
    kept = json.loads(record.read_text())
    for change in ({"error": 1.0}, {"onnx_sha256": "0" * 64}, {"plan_sha256": "0" * 64}):
        record.write_text(json.dumps({**kept, **change}))
        assert "tensorrt" not in compiled_files(Bundle(built)), change
    record.write_text("no json")
    assert "tensorrt" not in compiled_files(Bundle(built))

"""Which compiled files may be loaded: that can run code of whoever wrote them, so a manifest of ours has to vouch for each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from repdeploy.bundle import MANIFEST, Bundle
from repdeploy.digest import digest
from repdeploy.errors import RepDeployError, UsageError
from repdeploy.records import Artifact

RECORD_SUFFIX = ".json"
"""Behind a plan's name: what build_engine.py writes beside it on the target machine."""
PLAN_SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A file that is vouched for. `weights`: the ONNX file whose weights it lacks; `options`: what it was built with."""

    path: Path
    precision: str = "as built"
    weights: Path | None = None
    input_shape: tuple[int, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


def compiled_files(bundle: Bundle) -> dict[str, Compiled]:
    """The newest intact artifact of every kind but ONNX, and the plans that the bundle's build script made elsewhere."""
    found: dict[str, Compiled] = {}
    for path in sorted(bundle.path.glob("*.plan")):
        record = _record_of(path)
        if record is not None and record.get("onnx_sha256") in {item.sha256 for item in bundle.manifest.artifacts}:
            found["tensorrt"] = Compiled(path)
    for item in bundle.manifest.artifacts:
        if item.kind != "onnx" and (compiled := _compiled(bundle, item)) is not None:
            found[item.kind] = compiled
    return found


def is_intact(folder: Path, artifact: Artifact) -> bool:
    """Whether every file of an artifact is the one that the manifest vouches for."""
    files = ((artifact.file, artifact.sha256), *artifact.others)
    return all((folder / name).is_file() and digest(folder / name) == sha256 for name, sha256 in files)


def require_vouched(plan: Path, trusted: bool) -> Compiled:
    """A plan given by its own path. Raises UsageError for one that no manifest vouches for, unless it is trusted."""
    if (plan.parent / MANIFEST).is_file():
        try:
            bundle = Bundle(plan.parent)
        except RepDeployError:
            bundle = None
        for item in bundle.manifest.artifacts if bundle is not None else ():
            if item.file == plan.name and bundle is not None and (known := _compiled(bundle, item)) is not None:
                return known
        if bundle is not None and (built := compiled_files(bundle).get("tensorrt")) is not None and built.path == plan:
            return built
    if trusted:
        return Compiled(plan)
    raise UsageError(
        f"no manifest vouches for {plan.name}, and loading an engine can run code of whoever built it",
        hint="build it with repdeploy export --trt, or say that you trust it with --trust-engine",
    )


def _compiled(bundle: Bundle, item: Artifact) -> Compiled | None:
    """None where a file of it has changed, or the graph that a stripped plan takes its weights from."""
    weights = None
    if "strip_weights" in item.options:
        source = next((other for other in bundle.manifest.artifacts if other.sha256 == item.made_from), None)
        if source is None or not is_intact(bundle.path, source):
            return None
        weights = bundle.path / source.file
    if not is_intact(bundle.path, item):
        return None
    return Compiled(bundle.path / item.file, item.precision, weights, item.input_shape, dict(item.options))


def _record_of(plan: Path) -> dict[str, object] | None:
    """What build_engine.py wrote about a plan; None where it is about another one, or the check had failed."""
    try:
        record = json.loads(plan.with_name(plan.name + RECORD_SUFFIX).read_text(encoding="utf-8"))
        fine = record["plan_sha256"] == digest(plan) and record["error"] <= record["budget"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if fine else None

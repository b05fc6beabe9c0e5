"""From a described conversion to a bundle on disk: what both roads share. A failed verification leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from repdeploy import gates
from repdeploy.bundle import (
    BENCH,
    FAILED,
    MANIFEST,
    REFERENCES,
    SUFFIX,
    Bundle,
    check_target,
    new_bundle,
    save_references,
    write_text,
)
from repdeploy.digest import digest
from repdeploy.errors import InputError, UsageError, VerificationFailed
from repdeploy.records import ASSUMED, Conversion, Dtype, Gates, Manifest, to_json
from repdeploy.vouching import is_intact


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of `convert`; the fields are the command's options, on both roads."""

    family: str | None = None
    arch: str | None = None
    settings: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    expect: Path | None = None
    gates: Gates = "all"
    dtype: Dtype = "float32"
    dry_run: bool = False
    force: bool = False
    keep_failed: bool = False
    seed: int = 0
    force_squeeze: bool = False
    prune_dead: bool = False
    command: str = "repdeploy convert"


def deliver(target: Path, described: Manifest, fill: Callable[[Path], Manifest], request: Request) -> Conversion:
    """Let `fill` write a folder and say what it proved, and make that the bundle at the target.

    Raises UsageError for the target, VerificationFailed where a gate failed: then there is no bundle.
    """
    existing = _may_write(target, described, request)
    with new_bundle(target) as folder:
        manifest = fill(folder)
        if not manifest.verdict.passed:
            _report_failure(folder, target, manifest, request)
        if existing is not None:
            manifest = replace(manifest, notes=(*manifest.notes, *_replaced(existing, manifest, target)))
            manifest = _keep_artifacts(target, folder, existing, manifest)
        write_text(folder / MANIFEST, to_json(manifest))
    return Conversion(target, manifest)


def recorded(path: Path | None) -> dict[str, np.ndarray] | None:
    """The arrays of --expect, read before anything else is done. Raises UsageError, InputError."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="--expect takes an .npz with the arrays input and output")
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise InputError(f"{path.name} is one array", hint=gates.RECORD)
        with content:
            recorded = dict(content)
    except (OSError, ValueError, TypeError, EOFError) as reason:
        raise InputError(f"{path.name} is no .npz file of plain arrays: {reason}", hint="write it with np.savez") from reason
    gates.check_recorded(recorded)
    return recorded


def _may_write(target: Path, described: Manifest, request: Request) -> Manifest | None:
    """The bundle of the same source that stands at the target, if any. Raises UsageError for one of another source."""
    existing = check_target(target, request.force)
    if existing is None:
        return None
    same = (existing.source.sha256, existing.source.weights) == (described.source.sha256, described.source.weights)
    if not same and not request.force:
        raise UsageError(
            f"{target} was made from another source: {existing.source.file} ({existing.source.weights} weights)",
            hint="give another output with -o, or replace it with --force",
        )
    return existing if same else None


def _report_failure(folder: Path, target: Path, manifest: Manifest, request: Request) -> None:
    kept = ""
    if request.keep_failed:
        write_text(folder / MANIFEST, to_json(manifest))
        failed = target.with_name(target.name.removesuffix(SUFFIX) + FAILED + SUFFIX)
        if failed.exists():
            raise UsageError(f"{failed} exists already", hint="remove it and convert again")
        folder.rename(failed)
        kept = f"; the failed bundle is {failed}"
    first = manifest.verdict.failures[0]
    what = first.failure or f"error {first.error:.3g}, budget {first.budget:.3g} ({first.measure})"
    anchored = first.gate == "anchor" and manifest.graph is None
    what_to_report = "graph" if manifest.graph is not None else "checkpoint's key names"
    raise VerificationFailed(
        f"verification failed at gate '{first.gate}', {first.subject}: {what}; no bundle was written{kept}",
        hint=_other_causes(manifest)
        if anchored
        else f"please report this with the {what_to_report}; --keep-failed keeps the result for a look",
    )


def _other_causes(manifest: Manifest) -> str:
    """Why recorded outputs may not be this description's."""
    facts = ", ".join(dict.fromkeys(fact.name for fact in manifest.facts if fact.origin in ASSUMED))
    others = "--weights ema (the file holds EMA weights too), " if manifest.source.has_ema else ""
    return (
        f"the recorded outputs and this description differ: check what was assumed ({facts or 'nothing'}) with --set, "
        f"{others}the preprocessing of the images, and that the outputs are logits in evaluation mode"
    )


def _replaced(existing: Manifest, manifest: Manifest, target: Path) -> tuple[str, ...]:
    """What a bundle of the same source loses by being made again."""
    lost = []
    if existing.verdict.grade == "anchored" and manifest.verdict.grade != "anchored":
        lost.append("its verdict was anchored")
    if existing.weights_sha256 != manifest.weights_sha256 and existing.artifacts:
        made = [item.file for item in existing.artifacts if item.made_from != item.sha256]  # a graph is made from itself
        lost += [f"{', '.join(made)} had other weights and is gone"] if made else []
    if existing.weights_sha256 != manifest.weights_sha256 and (target / BENCH).is_file():
        lost.append(f"{BENCH} was measured on other weights and is gone")
    return (f"the bundle that was here is replaced: {'; '.join(lost)}",) if lost else ()


def _keep_artifacts(target: Path, folder: Path, existing: Manifest, manifest: Manifest) -> Manifest:
    """Take over what was exported from the very same weights; the rest is stale and goes."""
    if existing.weights_sha256 != manifest.weights_sha256:
        return manifest
    for artifact in existing.artifacts:
        if is_intact(target, artifact):
            for name in (artifact.file, *(other for other, _ in artifact.others)):
                (target / name).rename(folder / name)
            manifest = manifest.with_artifact(artifact)
    try:
        old = Bundle(target).references()
    except InputError:  # damaged, which converting again is the remedy for
        old = {}
    new = Bundle.references_in(folder)
    needed = {artifact.input_shape[1:] for artifact in manifest.artifacts} - set(new)
    if needed & set(old):
        save_references(folder / REFERENCES, new | {image: old[image] for image in needed & set(old)})
        manifest = replace(manifest, references_sha256=digest(folder / REFERENCES))
    if (target / BENCH).is_file():
        (target / BENCH).rename(folder / BENCH)
    return manifest

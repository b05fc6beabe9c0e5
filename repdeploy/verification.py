"""Judge artifacts again: replay a bundle's references, run its gates on other images, compare two artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from repdeploy import bundle as bundles
from repdeploy import gates
from repdeploy.bundle import Bundle
from repdeploy.checkpoint import Checkpoint
from repdeploy.digest import digest
from repdeploy.errors import InputError, UsageError
from repdeploy.exporters.onnx_file import image_of
from repdeploy.exporters.stage import onnx_checks
from repdeploy.family import Family
from repdeploy.progress import Progress
from repdeploy.proof import prove_again
from repdeploy.rebuild import deploy_network
from repdeploy.records import Check, Verification
from repdeploy.runtimes.onnx_cpu import OnnxSession


def replay(opened: Bundle, families: Sequence[Family], progress: Progress) -> Verification:
    """Every artifact of a bundle against the float64 references recorded in it."""
    checks: list[Check] = []
    skipped: list[str] = []
    if not opened.manifest.verdict.passed:
        first = opened.manifest.verdict.failures[0]
        checks.append(replace(first, failure=first.failure or "over budget when it was converted"))
    try:
        tensors, references = opened.tensors(), opened.references()
    except InputError as reason:  # a file that is not the one the manifest vouches for
        return Verification(str(opened.path), (*checks, _damaged(bundles.WEIGHTS, str(reason))))
    checks.append(Check("stored", f"{bundles.WEIGHTS}, {len(tensors)} tensors", 0.0, 0.0, SAME_FILE))
    if opened.manifest.skeleton is None or not references:
        skipped.append(f"no network-level reference: {opened.manifest.architecture}, gates {opened.manifest.verdict.grade}")
    for image, (inputs, outputs) in references.items():
        network = deploy_network(opened, families, image)  # type: ignore[arg-type]
        got = gates.run_in_chunks(network, torch.from_numpy(inputs))
        checks.append(
            gates.artifact_check(f"{bundles.WEIGHTS} in torch, {times(inputs.shape)}", got, torch.from_numpy(outputs), "fp32")
        )
    for artifact in opened.manifest.artifacts:
        progress(f"verifying {artifact.file}", 0, 1)
        path = opened.path / artifact.file
        if not path.is_file():
            checks.append(_damaged(artifact.file, "the file is missing"))
        elif digest(path) != artifact.sha256:
            checks.append(_damaged(artifact.file, "the file has changed since it was made"))
        elif artifact.kind == "onnx":
            pair = references.get(artifact.input_shape[1:])
            if pair is None:
                skipped.append(f"{artifact.file}: no reference for images of {times(artifact.input_shape[1:])}")
            else:
                checks += onnx_checks(path, artifact.precision, *pair, dynamic="batch" in artifact.dynamic)
        else:
            skipped.append(f"{artifact.file}: nothing here runs a {artifact.kind}")
    return Verification(str(opened.path), tuple(checks), tuple(skipped))


SAME_FILE = "SHA-256 differs"


def _damaged(file: str, failure: str) -> Check:
    return Check("artifact", file, float("inf"), 0.0, SAME_FILE, failure=failure)


def again(
    opened: Bundle,
    checkpoint: Checkpoint,
    families: Sequence[Family],
    shape: tuple[int, ...] | None,
    seed: int,
    progress: Progress,
) -> Verification:
    """The gates anew: the bundle's stored weights against the checkpoint, on other images."""
    manifest = opened.manifest
    if digest(checkpoint.path) != manifest.source.sha256:
        raise InputError(
            f"{checkpoint.path.name} is not the checkpoint this bundle was made from ({manifest.source.file})",
            hint="give the original checkpoint, or convert this one",
        )
    checks = prove_again(opened, checkpoint, families, shape, seed, progress)
    return Verification(f"{opened.path} against {checkpoint.path.name}", tuple(checks))


def compare(first: Path, second: Path, families: Sequence[Family], shape: tuple[int, ...] | None, seed: int) -> Verification:
    """Any two artifacts (bundles, ONNX files) on the same images; the first is the reference."""
    shapes = [found for path in (first, second) if (found := _own_shape(path)) is not None]
    wanted = shape or next((found for found in shapes if None not in found[1:]), None)
    if wanted is None:
        raise UsageError("neither side has a fixed image size", hint="give one with --input-shape 1x3x224x224")
    images = gates.gate_images(wanted[1:], seed, batch=max(2, wanted[0] or 1))  # type: ignore[arg-type]
    outputs = [torch.from_numpy(_run_any(path, families, images.numpy())) for path in (first, second)]
    check = gates.artifact_check(
        f"{second.name} against {first.name}, {times(images.shape)}", outputs[1], outputs[0].double(), "fp32"
    )
    return Verification(f"{first} against {second}", (check,))


def _own_shape(path: Path) -> tuple[int | None, ...] | None:
    if path.is_file():
        return image_of(known_file(path))[0]
    return Bundle(path).manifest.input_shape or None


def _run_any(path: Path, families: Sequence[Family], images: np.ndarray) -> np.ndarray:
    if path.is_file():
        return OnnxSession(path).run(images)
    network = deploy_network(Bundle(path), families, images.shape[1:])
    result: np.ndarray = gates.run_in_chunks(network, torch.from_numpy(images)).numpy()
    return result


def known_file(path: Path) -> Path:
    """Raises UsageError for a file that is no ONNX file."""
    if path.suffix != ".onnx":
        raise UsageError(f"{path.name} is neither a bundle nor an ONNX file", hint="give a bundle's folder or an .onnx file")
    return path


def times(shape: Sequence[object]) -> str:
    return "x".join(map(str, shape))


def image_of_file(path: Path, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The image an ONNX file takes, or the one that was asked for. Raises UsageError where neither is known."""
    own, _ = image_of(known_file(path))
    channels, height, width = shape[1:] if shape else own[1:] if len(own) == 4 else (None, None, None)
    if channels is None or height is None or width is None:
        raise UsageError(f"{path.name} takes images of any size", hint="choose one with --input-shape 1x3x224x224")
    return channels, height, width

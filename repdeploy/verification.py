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
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.sample_inputs import of_batch
from repdeploy.graph_fusion import graph_checks, prove_graph_again
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
    if opened.manifest.graph is not None:
        return _replay_graph(opened, checks, progress)
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
    return Verification(str(opened.path), tuple(checks), tuple(skipped), opened.manifest.verdict.warnings)


def _replay_graph(opened: Bundle, checks: list[Check], progress: Progress) -> Verification:
    """The recorded references through the original and the squeezed graph."""
    graph, skipped = opened.manifest.graph, []
    assert graph is not None
    try:
        inputs, outputs = opened.graph_references()
    except InputError as reason:
        return Verification(str(opened.path), (*checks, _damaged(bundles.REFERENCES, str(reason))))
    if not inputs:
        skipped.append(f"no network-level reference: gates {opened.manifest.verdict.grade}")
    files = [(graph.file, graph.sha256, "fp32")]
    files += [(item.file, item.sha256, item.precision) for item in opened.manifest.artifacts if item.kind == "onnx"]
    precision = files[-1][2]
    for file, sha256, _ in files:
        progress(f"verifying {file}", 0, 1)
        try:
            path = opened.intact(file, sha256)
        except InputError as reason:
            checks.append(_damaged(file, str(reason)))
            continue
        checks.append(Check("stored", file, 0.0, 0.0, SAME_FILE))
        if inputs:
            checks += graph_checks(path, inputs, outputs, precision)
    skipped += [f"{item.file}: nothing here runs a {item.kind}" for item in opened.manifest.artifacts if item.kind != "onnx"]
    return Verification(str(opened.path), tuple(checks), tuple(skipped))


def squeezed_again(opened: Bundle, source: Path, shape: tuple[int, ...] | None, seed: int, progress: Progress) -> Verification:
    """The gates anew on other images: the original graph is squeezed again and held against the stored one."""
    graph = opened.manifest.graph
    assert graph is not None
    if graph.model:
        raise UsageError(
            f"this bundle's graph was built by {graph.model}, which verify does not run",
            hint="convert again with --model and another --seed; verify without --against replays the references",
        )
    if not source.is_file():
        raise UsageError(f"there is no file {source}", hint="give the ONNX file that was converted")
    if digest(source) != opened.manifest.source.sha256:
        raise InputError(
            f"{source.name} is not the graph this bundle was made from ({opened.manifest.source.file})",
            hint="give the original graph, or convert this one",
        )
    onnx = next(item for item in opened.manifest.artifacts if item.kind == "onnx")
    checks = prove_graph_again(
        opened.graph_source(), opened.squeezed_graph(), shape or onnx.input_shape, graph.forced, seed, progress
    )
    return Verification(f"{opened.path} against {source.name}", tuple(checks))


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
    return Verification(f"{opened.path} against {checkpoint.path.name}", tuple(checks), warnings=manifest.verdict.warnings)


def compare(first: Path, second: Path, families: Sequence[Family], shape: tuple[int, ...] | None, seed: int) -> Verification:
    """Any two artifacts (bundles, ONNX files) on the same images; the first is the reference."""
    shapes = [found for path in (first, second) if (found := _own_shape(path)) is not None]
    wanted = shape or next((found for found in shapes if None not in found[1:]), None)
    if wanted is None:
        raise UsageError("neither side has a fixed image size", hint="give one with --input-shape 1x3x224x224")
    fixed = next((size for size in (found[0] for found in shapes) if size is not None), None)
    images = gates.gate_images(wanted[1:], seed, batch=fixed or max(2, wanted[0] or 1))  # type: ignore[arg-type]
    ours, theirs = (_run_any(path, families, images.numpy()) for path in (second, first))
    subject = f"{second.name} against {first.name}, {times(images.shape)}"
    if len(ours) != len(theirs):
        failure = f"{second.name} gives {len(ours)} outputs, {first.name} {len(theirs)}"
        return Verification(f"{first} against {second}", (Check("artifact", subject, float("inf"), 0.0, failure=failure),))
    checks = []
    for index, (got, expected) in enumerate(zip(ours, theirs, strict=True), 1):
        which = f"{subject}, output {index}" if len(ours) > 1 else subject
        checks.append(gates.artifact_check(which, torch.from_numpy(got), torch.from_numpy(expected).double(), "fp32"))
    return Verification(f"{first} against {second}", tuple(checks))


def _own_shape(path: Path) -> tuple[int | None, ...] | None:
    if path.is_file():
        return image_of(known_file(path))[0]
    opened = Bundle(path)
    return image_of(opened.squeezed_graph())[0] if opened.manifest.graph else opened.manifest.input_shape or None


def _run_any(path: Path, families: Sequence[Family], images: np.ndarray) -> list[np.ndarray]:
    """Every output."""
    opened = None if path.is_file() else Bundle(path)
    if opened is None or opened.manifest.graph is not None:
        file = opened.squeezed_graph() if opened is not None else path
        session = OnnxSession(file)
        if len(session.input_names) > 1:
            return list(session.run_all(of_batch(read_onnx(file).model.graph, images.shape)).values())
        return list(session.run_all({session.input_name: images}).values())
    network = deploy_network(opened, families, images.shape[1:])
    return [gates.run_in_chunks(network, torch.from_numpy(images)).numpy()]


def known_file(path: Path) -> Path:
    """Raises UsageError for a file that is no ONNX file."""
    if path.suffix != ".onnx":
        raise UsageError(f"{path.name} is neither a bundle nor an ONNX file", hint="give a bundle's folder or an .onnx file")
    return path


def times(shape: Sequence[object]) -> str:
    return "x".join(map(str, shape))


def fixed_batch(path: Path) -> int | None:
    """The batch that an ONNX file is fixed to; None where it is open."""
    sizes = image_of(known_file(path))[0]
    return sizes[0] if sizes else None


def image_of_file(path: Path, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The image an ONNX file takes, or the one that was asked for. Raises UsageError where neither is known."""
    own, _ = image_of(known_file(path))
    channels, height, width = shape[1:] if shape else own[1:] if len(own) == 4 else (None, None, None)
    if channels is None or height is None or width is None:
        raise UsageError(f"{path.name} takes images of any size", hint="choose one with --input-shape 1x3x224x224")
    return channels, height, width

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
from repdeploy.errors import BackendFailed, InputError, UsageError
from repdeploy.exporters.judging import REDUCED, onnx_checks, precision_of
from repdeploy.exporters.registry import EXPORTERS
from repdeploy.exporters.subject import recorded_cases
from repdeploy.family import Family
from repdeploy.graph.file_images import image_of, known_file
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.sample_inputs import of_batch
from repdeploy.graph.typed import TypedGraph
from repdeploy.graph_fusion import graph_checks, prove_graph_again
from repdeploy.progress import Progress
from repdeploy.proof import prove_again
from repdeploy.rebuild import deploy_network
from repdeploy.records import Artifact, Check, Verification
from repdeploy.runtimes.onnx_runtime import OnnxSession


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
        found, why_not = _replay_artifact(opened, artifact)
        checks += found
        skipped += [why_not] if why_not else []
    return Verification(str(opened.path), tuple(checks), tuple(skipped), opened.manifest.verdict.warnings)


def _replay_artifact(opened: Bundle, artifact: Artifact) -> tuple[list[Check], str]:
    """One artifact against the recorded references, by whoever wrote it; or why it was not judged."""
    for name, sha256 in ((artifact.file, artifact.sha256), *artifact.others):
        path = opened.path / name
        if not path.is_file():
            return [_damaged(name, "the file is missing")], ""
        if digest(path) != sha256:
            return [_damaged(name, "the file has changed since it was made")], ""
    path, cases = opened.path / artifact.file, recorded_cases(opened, artifact)
    if not cases:
        return [], f"{artifact.file}: no reference for images of {times(artifact.input_shape[1:])}"
    if artifact.kind == "onnx":
        return onnx_checks(path, artifact.precision, cases)[0], ""
    exporter = next((item for item in EXPORTERS.working() if item.name == artifact.kind), None)
    absent = exporter.missing() if exporter is not None else None
    if exporter is None or absent is not None:
        return [], f"{artifact.file}: {absent.what if absent else f'no exporter is called {artifact.kind}'}"
    try:
        return exporter.check(path, artifact, cases), ""
    except BackendFailed as reason:
        return [_failed(artifact.file, str(reason))], ""


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
    own = opened.own_artifact()
    for file, sha256 in ((graph.file, graph.sha256), (own.file, own.sha256)):
        progress(f"verifying {file}", 0, 1)
        try:
            path = opened.intact(file, sha256)
        except InputError as reason:
            checks.append(_damaged(file, str(reason)))
            continue
        checks.append(Check("stored", file, 0.0, 0.0, SAME_FILE))
        if inputs:
            checks += graph_checks(path, inputs, outputs, own.precision)
    for artifact in opened.manifest.artifacts:
        if artifact is not own:
            progress(f"verifying {artifact.file}", 0, 1)
            found, why_not = _replay_artifact(opened, artifact)
            checks += found
            skipped += [why_not] if why_not else []
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
    onnx = opened.own_artifact()
    checks = prove_graph_again(
        opened.graph_source(), opened.squeezed_graph(), shape or onnx.input_shape, graph.forced, seed, progress
    )
    return Verification(f"{opened.path} against {source.name}", tuple(checks))


SAME_FILE = "SHA-256 differs"


def _failed(file: str, failure: str) -> Check:
    return Check("artifact", file, float("inf"), 0.0, "it does not run", failure=failure)


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
    budget = max((_precision(path) for path in (first, second)), key=gates.PRECISION_BUDGETS.__getitem__)
    subject = f"{second.name} against {first.name}, {times(images.shape)}"
    if len(ours) != len(theirs):
        failure = f"{second.name} gives {len(ours)} outputs, {first.name} {len(theirs)}"
        return Verification(f"{first} against {second}", (Check("artifact", subject, float("inf"), 0.0, failure=failure),))
    checks = []
    for index, (got, expected) in enumerate(zip(ours, theirs, strict=True), 1):
        which = f"{subject}, output {index}" if len(ours) > 1 else subject
        checks.append(gates.artifact_check(which, torch.from_numpy(got), torch.from_numpy(expected).double(), budget))
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
        model = read_onnx(file).model
        names = [value.name or "" for value in model.graph.inputs]
        feeds = of_batch(model.graph, images.shape) if len(names) > 1 else {names[0]: images}
        if precision_of(model) in REDUCED:  # onnxruntime's CPU would leave its roundings out
            return [tensor.numpy() for tensor in TypedGraph(model).run(feeds).values()]
        return list(OnnxSession(file).run_all(feeds).values())
    network = deploy_network(opened, families, images.shape[1:])
    return [gates.run_in_chunks(network, torch.from_numpy(images)).numpy()]


def _precision(path: Path) -> str:
    """Of an ONNX file or a bundle's graph, by its weights."""
    opened = None if path.is_file() else Bundle(path)
    if opened is not None and opened.manifest.graph is None:
        return "fp32"
    return precision_of(read_onnx(opened.squeezed_graph() if opened is not None else path).model)


def times(shape: Sequence[object]) -> str:
    return "x".join(map(str, shape))

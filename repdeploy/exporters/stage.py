"""Export: artifacts into a bundle, each proved (gate 4) before the manifest names it; what is current is not made again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from repdeploy import gates
from repdeploy.bundle import REFERENCES, Bundle, replacing, save_references
from repdeploy.digest import digest
from repdeploy.errors import InputError, UsageError, VerificationFailed
from repdeploy.exporters import onnx_file, tensorrt_engine
from repdeploy.exporters.folding import folded, norms_in
from repdeploy.family import Family
from repdeploy.progress import Progress
from repdeploy.rebuild import check_image, deploy_network
from repdeploy.records import Artifact, Check, Export, GraphReport
from repdeploy.runtimes.onnx_cpu import OnnxSession

REFERENCE_IMAGES = 3
"""References at a deploy size of their own: enough for two batch sizes."""
PRECISION = "fp32"


def export(
    bundle: Bundle,
    families: Sequence[Family],
    shape: tuple[int, ...],
    *,
    trt: bool,
    output: Path | None,
    dynamic: str,
    fold: bool,
    command: str,
    progress: Progress,
) -> Export:
    """Write ONNX (and for `trt` the engine, or all that its target machine needs). `fold`: squeeze the graph as well.

    Raises UsageError where `output` would replace something that is no export of ours.
    """
    bundle.require_verified()
    if bundle.manifest.graph is not None:
        return _of_graph(bundle, bundle.manifest.graph, shape, trt=trt, output=output, command=command)
    image = check_image(bundle, families, shape)
    name = f"model.{PRECISION}.onnx"
    path = output or bundle.path / name
    if output is not None:
        _may_write(output)
    with bundle.locked():
        progress("exporting ONNX", 0, 3)
        current = _current(bundle, name, shape, dynamic, fold) if output is None else None
        written = current
        if written is None:
            inputs, outputs = _references(bundle, families, image, progress)
            network = deploy_network(bundle, families, image)
            limits = _limits(bundle, families, image)
            written = _write_onnx(
                bundle, network, path, image, shape, dynamic, fold, command, limits, inputs, outputs, progress
            )
            if output is None:
                bundle.write_manifest(bundle.manifest.with_artifact(written))
        reused = (name,) if current is not None else ()
        progress("exporting ONNX", 3, 3)
        if not trt:
            return Export(path.parent, (written,), reused, norms=_norms_left(bundle, path))
        return _tensorrt(bundle, written, path, {onnx_file.INPUT: image}, command, reused)


def _of_graph(
    bundle: Bundle, graph: GraphReport, shape: tuple[int, ...], *, trt: bool, output: Path | None, command: str
) -> Export:
    """A bundle that was made from a graph has its ONNX, with the axes that the graph has.

    Raises InputError for another image size, UsageError where `output` would replace something that is no export of ours.
    """
    onnx = next(item for item in bundle.manifest.artifacts if item.kind == "onnx")
    if shape[1:] != onnx.input_shape[1:]:
        raise InputError(
            f"this bundle was squeezed and proved at {'x'.join(map(str, onnx.input_shape))}",
            hint="convert the graph again with that --input-shape",
        )
    path = bundle.squeezed_graph()
    if output is not None:
        _may_write(output)
        with replacing(output) as temporary:
            shutil.copyfile(path, temporary)
        return Export(output.parent, (replace(onnx, file=output.name),))
    if not trt:
        return Export(bundle.path, (onnx,), (onnx.file,))
    with bundle.locked():
        # an input whose first axis is fixed needs no profile
        is_open = {port.name for port in graph.inputs if port.shape and not port.shape[0].isdigit()}
        shapes = {name: sampled[1:] for name, sampled in graph.sampled if name in is_open or not onnx.dynamic}
        return _tensorrt(bundle, onnx, path, shapes, command, (onnx.file,))


def _may_write(output: Path) -> None:
    """Raises UsageError where a file of somebody else stands, or no folder."""
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", hint="make it first, or give another -o")
    if output.is_dir() or (output.exists() and not onnx_file.is_ours(output)):
        raise UsageError(f"{output} exists and is no export of ours; it is left as it is", hint="give another name with -o")


def onnx_checks(path: Path, precision: str, inputs: np.ndarray, outputs: np.ndarray, *, dynamic: bool) -> list[Check]:
    """Gate 4: the file through onnxruntime against the float64 reference, at two batch sizes where it takes them."""
    session = OnnxSession(path)
    sizes = sorted({len(inputs), 1}) if dynamic else [onnx_file.image_of(path)[0][0] or 1]
    checks = []
    for size in sizes:
        x = np.concatenate([inputs] * -(-size // len(inputs)))[:size]
        wanted = np.concatenate([outputs] * -(-size // len(outputs)))[:size]
        got = torch.from_numpy(session.run(np.ascontiguousarray(x)))
        subject = f"{path.name} in onnxruntime, batch {size}"
        checks.append(gates.artifact_check(subject, got, torch.from_numpy(wanted), precision))
    return checks


def _limits(bundle: Bundle, families: Sequence[Family], image: tuple[int, int, int]) -> dict[str, str]:
    """What a graph must say of itself because its skeleton's graphs hold at one size only."""
    skeletons = (item for family in families for item in family.skeletons if item.name == bundle.manifest.skeleton)
    reason = next(skeletons).one_resolution
    return {"valid_at": f"{image[1]}x{image[2]} only: {reason}"} if reason else {}


def _write_onnx(
    bundle: Bundle,
    network: torch.nn.Module,
    path: Path,
    image: tuple[int, int, int],
    shape: tuple[int, ...],
    dynamic: str,
    fold: bool,
    command: str,
    limits: dict[str, str],
    inputs: np.ndarray,
    outputs: np.ndarray,
    progress: Progress,
) -> Artifact:
    manifest = bundle.manifest
    provenance = {
        "source": manifest.source.file, "source_sha256": manifest.source.sha256, "weights_sha256": manifest.weights_sha256,
        "family": manifest.family, "architecture": manifest.architecture, "grade": manifest.verdict.grade,
        "version": manifest.tools.get("repdeploy", ""), **limits,
        **({"warnings": "; ".join(manifest.verdict.warnings)} if manifest.verdict.warnings else {}),
    }  # fmt: skip
    with replacing(path) as temporary:
        batch = None if dynamic == "batch" else shape[0]
        change = folded if fold else None
        opset = onnx_file.write_onnx(network, temporary, image, batch=batch, provenance=provenance, change=change)
        progress("verifying ONNX", 2, 3)
        checks = onnx_checks(temporary, PRECISION, inputs, outputs, dynamic=batch is None)
        checks = [replace(check, subject=check.subject.replace(temporary.name, path.name)) for check in checks]
        failed = next((check for check in checks if not check.passed), None)
        if failed is not None:
            raise VerificationFailed(
                f"{path.name} is not the proved network: {failed.subject}: "
                f"{failed.failure or f'error {failed.error:.3g}, budget {failed.budget:.3g}'}; it was not written",
                hint="please report this with the versions that repdeploy doctor prints",
            )
    return Artifact(
        file=path.name, kind="onnx", precision=PRECISION, sha256=digest(path), bytes=path.stat().st_size,
        made_from=manifest.weights_sha256, command=command, input_shape=shape, opset=opset,
        dynamic=("batch",) if dynamic == "batch" else (), checks=tuple(checks), folded=fold,
    )  # fmt: skip


def _references(
    bundle: Bundle, families: Sequence[Family], image: tuple[int, int, int], progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and float64 outputs at an image size: the gates' own where they fit, else made from the proved weights."""
    known = bundle.references()
    if image not in known:
        progress("running the proved network in float64", 1, 3)
        images = gates.gate_images(image, batch=REFERENCE_IMAGES)
        exact = gates.run_in_chunks(deploy_network(bundle, families, image, torch.float64), images.double())
        known[image] = images.numpy(), exact.numpy()
        save_references(bundle.path / REFERENCES, known)
        bundle.write_manifest(replace(bundle.manifest, references_sha256=digest(bundle.path / REFERENCES)))
    return known[image]


def _norms_left(bundle: Bundle, path: Path) -> tuple[tuple[str, str], ...]:
    """The batch norms that the written graph still has, and why the network has them."""
    left = norms_in(path)
    return tuple((name, reason) for name, reason in bundle.manifest.norms if name in left)


def _current(bundle: Bundle, name: str, shape: tuple[int, ...], dynamic: str, fold: bool) -> Artifact | None:
    """The artifact of that name, where it was made from these weights for this shape and is unchanged since."""
    artifact, path = bundle.manifest.artifact(name), bundle.path / name
    wanted = ("batch",) if dynamic == "batch" else ()
    if artifact is None or artifact.made_from != bundle.manifest.weights_sha256:
        return None
    if artifact.dynamic != wanted or artifact.folded != fold:
        return None
    same_shape = artifact.input_shape[1:] == shape[1:] if wanted else artifact.input_shape == shape
    return artifact if same_shape and path.is_file() and digest(path) == artifact.sha256 else None


def _tensorrt(
    bundle: Bundle, onnx: Artifact, path: Path, shapes: tensorrt_engine.Shapes, command: str, reused: tuple[str, ...]
) -> Export:
    size = onnx.input_shape[0]
    batches = tensorrt_engine.BATCHES if onnx.dynamic else (size, size, size)
    tensorrt_engine.write_build_script(bundle.path, path.name, shapes, batches, onnx.precision)
    line = tensorrt_engine.trtexec_line(path.name, shapes, batches)
    notes = (f"{tensorrt_engine.SCRIPT} builds, runs and checks the engine on the target machine", f"or: {line}")
    absent = tensorrt_engine.missing()
    if absent is not None:
        return Export(
            bundle.path, (onnx,), reused, missing=absent[0], hint=absent[1], notes=notes, norms=_norms_left(bundle, path)
        )
    plan = tensorrt_engine.build_engine(bundle.path)
    engine = Artifact(
        file=plan.name, kind="tensorrt", precision=onnx.precision, sha256=digest(plan), bytes=plan.stat().st_size,
        made_from=bundle.manifest.weights_sha256, command=command, input_shape=onnx.input_shape, dynamic=onnx.dynamic,
    )  # fmt: skip
    bundle.write_manifest(bundle.manifest.with_artifact(engine))
    return Export(bundle.path, (onnx, engine), reused, notes=notes, norms=_norms_left(bundle, path))

"""Squeeze a graph into a bundle, and prove it: read, squeeze region by region, write, gates on the written file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from repdeploy import gates
from repdeploy.bundle import REFERENCES, SOURCE, save_graph_references
from repdeploy.delivery import Request, deliver, recorded
from repdeploy.digest import Digest, digest
from repdeploy.errors import BackendFailed, InputError
from repdeploy.exporters.judging import REDUCED, precision_of
from repdeploy.graph.interpreter import RANDOM
from repdeploy.graph.model_proof import PRECISIONS, exact_outputs, prove_model, runnable
from repdeploy.graph.onnx_source import OnnxSource, read_onnx, write_model
from repdeploy.graph.regions import Kept
from repdeploy.graph.rewrite import numbers_in
from repdeploy.graph.sample_inputs import Arrays, InputPlan, plans
from repdeploy.graph.squeezer import GRAPH, Squeezed, squeeze
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check, Conversion, GraphReport, KeptNode, Manifest, Port, Source, Verdict
from repdeploy.runtimes.onnx_runtime import OnnxSession
from repdeploy.versions import tool_versions


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a graph comes from, beside its file: the record of what was converted, and what anchors it."""

    source: Source
    model: str = ""
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def convert(path: Path, hashing: Digest, target: Path, request: Request, progress: Progress) -> Conversion:
    """Convert an ONNX file. Writes nothing on a dry run, where nothing can be squeezed, or when a gate fails.

    Raises InputError for what is not understood, UsageError for the target, VerificationFailed when a gate fails.
    """
    expect = recorded(request.expect)
    progress("reading the graph", 0, 1)
    source = read_onnx(path)
    origin = Origin(
        Source(path.name, hashing.result(), path.stat().st_size, source.container, "model", where="", prefix="", has_ema=False)
    )
    return convert_graph(source, origin, target, request, expect, progress)


def convert_graph(
    source: OnnxSource,
    origin: Origin,
    target: Path,
    request: Request,
    expect: Mapping[str, np.ndarray] | None,
    progress: Progress,
    compare: Callable[[Squeezed], Iterable[Check]] = lambda _: (),
) -> Conversion:
    """The graph road from a model that was read, whoever wrote it. `compare`: further checks of what was squeezed."""
    _require_steady(source)
    tried = plans(source.model.graph, request.input_shape)
    plan, said = runnable(source.path, tried) if request.gates == "all" and not request.dry_run else (tried[0], "")
    squeezed = source.model.clone()
    done = squeeze(
        squeezed,
        plan.shapes,
        force=request.force_squeeze,
        convolve_float64=bool(said),
        seed=request.seed,
        progress=progress,
    )
    described = _described(source, origin, squeezed, done, plan, request)
    if not done.regions:
        return Conversion(None, described, already_deployed=True)
    if request.dry_run:
        return Conversion(None, described)

    def fill(folder: Path) -> Manifest:
        source.copy_to(folder / SOURCE)
        precision = _precision(squeezed, done)
        model = folder / f"model.{precision}.onnx"
        for key, value in (("source", origin.source.file), ("source_sha256", origin.source.sha256)):
            squeezed.metadata_props[f"repdeploy.{key}"] = value
        progress("writing and reading back", 0, 1)
        apart = write_model(squeezed, model)
        checks = [region.check for region in done.regions] + [*origin.checks, *compare(done)]
        written = read_onnx(model).model
        checks.append(gates.stored_gate(_stored_pairs(written, done)))
        manifest, grade = described, described.verdict.grade
        if request.gates == "all":
            progress("running original and squeezed graph", 0, 1)
            try:
                proof = prove_model(source.model, written, source.path, model, done, plan, request.seed)
            except BackendFailed as reason:
                raise InputError(
                    f"nothing here runs {origin.source.file}: {said or reason}",
                    hint="check the graph and --input-shape, or prove the regions alone with --gates blocks",
                ) from reason
            checks += proof.checks
            manifest = replace(manifest, notes=(*manifest.notes, *proof.notes))
            if proof.checks:  # the original graph was run as the user wrote it: it is the anchor
                grade = "anchored"
            if expect is not None:
                checks.append(_expected(source.model, expect))
            if proof.references is not None:
                save_graph_references(folder / REFERENCES, proof.references.inputs, proof.references.outputs)
                manifest = replace(manifest, references_sha256=digest(folder / REFERENCES))
        manifest = replace(manifest, weights_sha256=digest(model))
        verdict = Verdict(all(check.passed for check in checks), grade, tuple(checks))
        artifact = Artifact(
            file=model.name, kind="onnx", precision=precision, sha256=manifest.weights_sha256,
            bytes=model.stat().st_size, made_from=manifest.weights_sha256, command=request.command,
            input_shape=plan.shapes[plan.image], opset=source.opset, dynamic=("batch",) if plan.open_batch else (),
            checks=tuple(check for check in checks if check.gate == "rounding"),
            others=tuple((name, digest(folder / name)) for name in apart),
        )  # fmt: skip
        return replace(manifest, verdict=verdict).with_artifact(artifact)

    return deliver(target, described, fill, request)


def _require_steady(source: OnnxSource) -> None:
    """Raises InputError for a graph that answers differently at every run: there is nothing to hold against it."""
    node = next((node for node in source.model.graph.all_nodes() if node.op_type in RANDOM), None)
    if node is not None:
        raise InputError(
            f"{source.path.name} draws random numbers ({node.op_type} {node.name or ''})",
            hint="export the network in evaluation mode",
        )


def graph_checks(path: Path, inputs: Arrays, outputs: Arrays, precision: str) -> list[Check]:
    """Gate 4: a graph's file in onnxruntime against recorded float64 outputs, (sets, ...) each, output by output."""
    sets = len(next(iter(inputs.values())))
    feeds = [{name: array[index] for name, array in inputs.items()} for index in range(sets)]
    where = "onnxruntime"
    try:
        session = OnnxSession(path)
        answers = [session.run_all(feed) for feed in feeds]
        found = [{name: torch.from_numpy(answer[name]) for name in outputs if name in answer} for answer in answers]
    except BackendFailed:  # as when it was converted: float64, or an operator of another domain
        where, found = "float64", exact_outputs(read_onnx(path).model, feeds)
    checks = []
    for name, wanted in outputs.items():
        parts = [result[name] for result in found if name in result]
        got = torch.stack(parts) if len(parts) == sets else torch.zeros(0)
        subject = f"{path.name} in {where}, {sets} sets" + (f", {name}" if len(outputs) > 1 else "")
        checks.append(gates.artifact_check(subject, got, torch.from_numpy(wanted), precision))
    return checks


def prove_graph_again(
    source: Path, written: Path, shape: tuple[int, ...], forced: bool, seed: int, progress: Progress
) -> list[Check]:
    """Every gate anew, on other images: the original squeezed again, and held against what was written."""
    original, stored = read_onnx(source), read_onnx(written).model
    tried = plans(original.model.graph, shape)
    plan, said = runnable(source, tried)
    again = original.model.clone()
    done = squeeze(again, plan.shapes, force=forced, convolve_float64=bool(said), seed=seed, progress=progress)
    checks = [region.check for region in done.regions] + [gates.stored_gate(_stored_pairs(stored, done))]
    progress("running original and squeezed graph", 0, 1)
    return checks + list(prove_model(original.model, stored, source, written, done, plan, seed).checks)


def _described(
    source: OnnxSource, origin: Origin, squeezed: ir.Model, done: Squeezed, plan: InputPlan, request: Request
) -> Manifest:
    """The manifest before anything was proved as a whole or written."""
    before, after = (_operators(model) for model in (source.model, squeezed))
    costs = [(item.region.before, item.region.after) for item in done.regions]
    report = GraphReport(
        file=SOURCE,
        sha256=digest(source.path) if origin.model else origin.source.sha256,
        opset=source.opset,
        inputs=tuple(_port(value) for value in source.model.graph.inputs),
        outputs=tuple(_port(value) for value in source.model.graph.outputs),
        sampled=tuple(plan.shapes.items()),
        operators_before=before,
        operators_after=after,
        flops_before=sum(cost.flops for cost, _ in costs if cost),
        flops_after=sum(cost.flops for _, cost in costs if cost),
        bytes_before=sum(cost.bytes for cost, _ in costs if cost),
        bytes_after=sum(cost.bytes for _, cost in costs if cost),
        kept=tuple(_kept(item) for item in done.kept),
        forced=request.force_squeeze,
        model=origin.model,
    )
    shape = plan.shapes[plan.image]
    total = sum(count for _, count in before)
    return Manifest(
        source=origin.source,
        family=GRAPH,
        families=(GRAPH,),
        architecture=f"{total} operators -> {sum(count for _, count in after)}",
        skeleton=None,
        input_shape=shape,
        gate_shape=shape[1:],
        facts=(),
        blocks=tuple(item.report for item in done.regions),
        copied=(),
        dropped=(),
        parameters_before=_numbers(source.model),
        parameters_after=_numbers(squeezed),
        verdict=Verdict(False, "blocks only", ()),
        training={},
        weights_sha256="",
        references_sha256=None,
        command=request.command,
        tools=tool_versions(),
        notes=(*source.notes, *origin.notes),
        graph=report,
    )


def _operators(model: ir.Model) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(node.op_type for node in model.graph.all_nodes() if node.op_type != "Constant").most_common())


def _numbers(model: ir.Model) -> int:
    """Floating point numbers stored in a model."""
    stored = model.graph.initializers.values()
    return sum(numbers_in(value) for value in stored if value.dtype is not None and value.dtype.is_floating_point())


def _port(value: ir.Value) -> Port:
    shape = tuple(str(size) if isinstance(size, int) else size.value or "?" for size in value.shape or ())
    return Port(value.name or "", value.dtype.name.lower() if value.dtype is not None else "?", shape)


def _kept(item: Kept) -> KeptNode:
    flops = (item.estimate.before.flops, item.estimate.after.flops) if item.estimate is not None else (None, None)
    return KeptNode(item.node.name or "", item.node.op_type, item.reason, *flops)


def _precision(model: ir.Model, done: Squeezed) -> str:
    """Of a squeezed graph: its lowest one; not every exporter writes down the types of what is computed."""
    if (reduced := precision_of(model)) in REDUCED:
        return reduced
    kinds = Counter(item.region.output.dtype or ir.DataType.FLOAT for item in done.regions)
    return PRECISIONS.get(kinds.most_common(1)[0][0], "fp32")


def _stored_pairs(written: ir.Model, done: Squeezed) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """What should be stored beside what is; a later round may have squeezed an earlier one's result."""
    for region in done.regions:
        for name, exact in region.placed.stored.items():
            value = written.graph.initializers.get(name)
            if value is not None and value.const_value is not None:
                array = np.array(value.const_value.numpy())
                rounded = exact.numpy().astype(array.dtype)  # torch has no name for some types of ONNX
                yield name, torch.from_numpy(rounded.astype(np.float64)), torch.from_numpy(array.astype(np.float64))


def _expected(model: ir.Model, expect: Mapping[str, np.ndarray]) -> Check:
    """The anchor: the original graph in float64 against outputs that the user's own code recorded."""
    names = [value.name or "" for value in model.graph.inputs], [value.name or "" for value in model.graph.outputs]
    if len(names[0]) > 1:
        raise InputError(
            "--expect compares graphs of one input", hint="leave it out: the graph itself is what is compared with"
        )
    shape, given = model.graph.inputs[0].shape, expect["input"].shape
    own = tuple(size if isinstance(size, int) else size.value or "?" for size in shape) if shape is not None else given
    if len(own) != len(given) or any(isinstance(size, int) and size != other for size, other in zip(own, given, strict=True)):
        raise InputError(f"--expect: input has shape {given}, the graph takes {own}", hint=gates.RECORD)
    found = exact_outputs(model, [{names[0][0]: expect["input"]}])[0]
    if names[1][0] not in found:
        raise InputError(
            f"--expect: output {names[1][0]} is behind an operator that only onnxruntime runs", hint="leave it out"
        )
    got, wanted = found[names[1][0]], torch.from_numpy(np.asarray(expect["output"]))
    if got.shape != wanted.shape:
        raise InputError(
            f"--expect: output has shape {tuple(wanted.shape)}, the graph gives {tuple(got.shape)}", hint=gates.RECORD
        )
    kind = str(wanted.dtype).removeprefix("torch.")
    error = gates.relative_error(got, wanted)
    return Check("anchor", f"recorded {kind} outputs, {len(wanted)} images", error, gates.EXPECT_BUDGETS[kind])

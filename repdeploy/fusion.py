"""Fuse a checkpoint into a bundle, and prove it: load, recognise, squeeze block by block, gates, write.

Fusing streams: one block's tensors are in memory at a time, and reading, squeezing, hashing and writing overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.algebra import Conv, Linear
from repdeploy.bundle import (
    BENCH,
    REFERENCES,
    SUFFIX,
    WEIGHTS,
    Bundle,
    check_target,
    new_bundle,
    save_references,
    write_text,
)  # fmt: skip
from repdeploy.bundle import MANIFEST as MANIFEST_FILE
from repdeploy.checkpoint import Checkpoint, StoredTensor
from repdeploy.checkpoint.load import printable
from repdeploy.checkpoint.other_files import read_safetensors
from repdeploy.digest import Digest, digest
from repdeploy.errors import CannotSqueeze, InputError, UsageError, VerificationFailed
from repdeploy.facts import Facts, Setting, parse_settings, settings_of
from repdeploy.family import NORM_EPS, Family
from repdeploy.keys import inside
from repdeploy.network import build
from repdeploy.progress import Progress, each
from repdeploy.rebuild import fact_kinds, not_finite, reader, rebuilt
from repdeploy.recognise import COUNTER, Plan, Recognition, Slot, Table, arch_settings, keys_of, recognise
from repdeploy.records import (
    ASSUMED,
    BlockReport,
    Check,
    Conversion,
    Dtype,
    Gates,
    Inspection,
    Manifest,
    Source,
    TensorShape,
    Verdict,
    to_json,
)  # fmt: skip
from repdeploy.weights_file import NAMES, WeightsWriter

YOLO_EPS = 1e-3
"""YOLOv6 and v7 use RepVGG's keys with this eps; where nobody states eps, the report says how much it would change."""
TOOLS = ("repdeploy", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors")


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of `convert`; the fields are the command's options."""

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
    command: str = "repdeploy convert"


def read_facts(
    checkpoint: Checkpoint, families: Sequence[Family], settings: Iterable[str], arch: str | None
) -> tuple[Facts, str | None]:
    """The facts that were stated, and the official name of `arch`."""
    official, settled = arch_settings(arch, families)
    stated = parse_settings(settings, fact_kinds(families))
    return Facts((*stated, *settled), checkpoint.attributes), official


def describe(
    checkpoint: Checkpoint,
    hashing: Digest,
    families: Sequence[Family],
    family: str | None,
    arch: str | None,
    settings: tuple[str, ...],
) -> Inspection:
    """What a checkpoint holds, from names and shapes; no numbers are read."""
    facts, official = read_facts(checkpoint, families, settings, arch)
    found = recognise(checkpoint.tensors, families, facts, family=family, stored_name=checkpoint.architecture, arch=official)
    _all_settings_used(facts, found)
    reports, before, after = describe_blocks(checkpoint, found)
    used = {key for slot in found.slots for key in slot.consumed}
    outside = () if found.plan else tuple(key for key in checkpoint.tensors if key not in used and not key.endswith(COUNTER))
    return Inspection(
        source=source_record(checkpoint, hashing.result()),
        matches=found.matches,
        skeletons=found.skeletons,
        family=found.family,
        architecture=found.architecture,
        blocks=reports,
        facts=facts.record(),
        parameters_before=before,
        parameters_after=after,
        already_deployed=found.already_deployed,
        left_alone=outside,
        notes=found.notes,
    )


def convert(
    checkpoint: Checkpoint,
    hashing: Digest,
    families: Sequence[Family],
    target: Path,
    request: Request,
    progress: Progress,
) -> Conversion:
    """Convert one checkpoint. Writes nothing on a dry run, for an already fused file, or when a gate fails.

    Raises the errors of `recognise`, UsageError for the target, VerificationFailed when a gate fails.
    """
    facts, official = read_facts(checkpoint, families, request.settings, request.arch)
    progress("recognising", 0, 1)
    recognition = recognise(
        checkpoint.tensors,
        families,
        facts,
        family=request.family,
        stored_name=checkpoint.architecture,
        arch=official,
        input_shape=_image(request.input_shape),
    )
    _all_settings_used(facts, recognition)
    fusable = [slot for slot in recognition.slots if slot.form == "training"]
    if not fusable:
        return Conversion(None, _describe_only(checkpoint, recognition, facts, hashing, request), already_deployed=True)
    existing = None if request.dry_run else _may_write(target, hashing, checkpoint, request)
    if request.dry_run:
        return Conversion(None, _describe_only(checkpoint, recognition, facts, hashing, request))
    with new_bundle(target) as folder:
        manifest = _fill(folder, checkpoint, recognition, facts, hashing, families, request, progress)
        if not manifest.verdict.passed:
            _report_failure(folder, target, manifest, request)
        if existing is not None:
            manifest = _keep_artifacts(target, folder, existing, manifest)
        write_text(folder / MANIFEST_FILE, to_json(manifest))
    return Conversion(target, manifest)


def prove_again(
    bundle: Bundle,
    checkpoint: Checkpoint,
    families: Sequence[Family],
    shape: tuple[int, ...] | None,
    seed: int,
    progress: Progress,
) -> list[Check]:
    """Every gate anew, on other images: the checkpoint, described with the recorded facts, against the stored weights."""
    manifest = bundle.manifest
    facts = Facts(settings_of(manifest.facts, fact_kinds(families)))
    image = _image(shape) or (manifest.gate_shape or None)
    recognition = recognise(checkpoint.tensors, families, facts, family=manifest.family, input_shape=image)  # type: ignore[arg-type]
    read, keys, written = reader(checkpoint.tensors), keys_of(checkpoint.tensors), bundle.tensors()
    checks: list[Check] = []
    with gates.exact_arithmetic():
        for slot in each(progress, "proving blocks", [slot for slot in recognition.slots if slot.form == "training"]):
            expression = slot.describe(read, facts, keys)
            fused = expression.squeeze().zero_filled()
            checks.append(gates.algebra(slot.name, expression, fused, seed))
            pairs = zip(slot.deploy_keys, (fused.weight, _bias(fused)), strict=True)
            stored = gates.stored_gate((key, exact, written[key].read()) for key, exact in pairs)
            checks.append(replace(stored, subject=slot.name))
    if recognition.plan is not None:
        weights = bundle.path / WEIGHTS
        checks += _prove_network(weights, checkpoint, recognition.plan, facts, families, None, seed, progress)[0]
    return checks


def describe_blocks(checkpoint: Checkpoint, recognition: Recognition) -> tuple[tuple[BlockReport, ...], int, int]:
    """Every block from its shapes alone, and the parameters before and after."""
    reports = tuple(_block_report(slot, checkpoint.tensors, None) for slot in recognition.slots)
    before = sum(_parameters(checkpoint.tensors, [key]) for key in checkpoint.tensors)
    gone = [key for key in checkpoint.tensors if any(inside(key, name) for name in recognition.dropped)]
    after = before - _parameters(checkpoint.tensors, gone) - sum(r.parameters_before - r.parameters_after for r in reports)
    return reports, before, after


def source_record(checkpoint: Checkpoint, sha256: str) -> Source:
    return Source(
        file=printable(checkpoint.path.name),
        sha256=sha256,
        bytes=checkpoint.path.stat().st_size,
        container=checkpoint.container,
        weights=checkpoint.weights,
        where=checkpoint.where,
        prefix=checkpoint.prefix,
        has_ema=checkpoint.has_ema,
        others=checkpoint.others,
        architecture=checkpoint.architecture,
        inert=tuple(sorted(checkpoint.inert)),
    )


def tool_versions() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _all_settings_used(facts: Facts, recognition: Recognition) -> None:
    """Raises UsageError for a --set that no block read: a typo must not pass for an answer."""
    for setting in facts.unused():
        raise UsageError(
            f"--set {setting.scope + '.' if setting.scope else ''}{setting.name}={setting.value} changed nothing",
            hint=f"blocks here are {_some(slot.name or '(root)' for slot in recognition.slots)}; "
            f"facts they read: {', '.join(sorted({fact.name for fact in facts.record()}))}",
        )


def _may_write(target: Path, hashing: Digest, checkpoint: Checkpoint, request: Request) -> Manifest | None:
    existing = check_target(target, request.force)
    if existing is None:
        return None
    same = existing.source.sha256 == hashing.result() and existing.source.weights == checkpoint.weights
    if not same and not request.force:
        raise UsageError(
            f"{target} was made from another source: {existing.source.file} ({existing.source.weights} weights)",
            hint="give another output with -o, or replace it with --force",
        )
    return existing if same else None


def _fill(
    folder: Path,
    checkpoint: Checkpoint,
    recognition: Recognition,
    facts: Facts,
    hashing: Digest,
    families: Sequence[Family],
    request: Request,
    progress: Progress,
) -> Manifest:
    """Write weights and references into a folder and return what the manifest will say."""
    outcome = _fuse(folder / WEIGHTS, checkpoint, recognition, facts, request, progress)
    checks, plan = list(outcome.checks), recognition.plan
    grade: Literal["anchored", "self-consistent", "blocks only"] = "blocks only"
    references_sha256 = None
    warnings = list(outcome.warnings)
    if plan is not None and request.gates == "all":
        grade = "anchored" if request.expect is not None else "self-consistent"
        network_checks, images, reference = _prove_network(
            folder / WEIGHTS, checkpoint, plan, facts, families, request.expect, request.seed, progress
        )
        checks += network_checks
        save_references(folder / REFERENCES, {plan.gate_shape: (images.numpy(), reference.numpy())})
        references_sha256 = digest(folder / REFERENCES)
    elif request.expect is not None:
        raise InputError(
            "--expect compares whole networks, and "
            + ("--gates blocks leaves them out" if plan else "only blocks are known here"),
            hint="leave --expect out" + (" or use --gates all" if plan else ""),
        )
    reports, before, after = describe_blocks(checkpoint, recognition)
    residuals = {check.subject: check.error for check in outcome.checks if check.gate == "algebra"}
    recorded = facts.record()
    return Manifest(
        source=source_record(checkpoint, hashing.result()),
        family=recognition.family,
        families=recognition.families,
        architecture=recognition.architecture,
        skeleton=plan.skeleton.name if plan else None,
        input_shape=_input_shape(plan, request),
        gate_shape=plan.gate_shape if plan else (),
        facts=recorded,
        blocks=tuple(replace(report, residual=residuals.get(report.name)) for report in reports),
        copied=outcome.copied,
        dropped=outcome.dropped,
        parameters_before=before,
        parameters_after=after,
        verdict=Verdict(
            all(check.passed for check in checks), grade, tuple(checks),
            tuple(fact for fact in recorded if fact.origin in ASSUMED), tuple(warnings),
        ),
        training={key: TensorShape(t.shape, str(t.dtype).removeprefix("torch.")) for key, t in checkpoint.tensors.items()},
        weights_sha256=outcome.sha256,
        references_sha256=references_sha256,
        command=request.command,
        tools=tool_versions(),
        notes=recognition.notes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Fused:
    checks: tuple[Check, ...]
    copied: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    sha256: str
    warnings: tuple[str, ...]


def _fuse(
    path: Path, checkpoint: Checkpoint, recognition: Recognition, facts: Facts, request: Request, progress: Progress
) -> _Fused:
    """Squeeze and prove block by block (gate 1), and stream the deploy state dict."""
    dtype: torch.dtype = getattr(torch, request.dtype)
    tensors, keys = checkpoint.tensors, keys_of(checkpoint.tensors)
    owner = {key: slot for slot in recognition.slots if slot.form == "training" for key in slot.consumed}
    steps: list[tuple[str, Slot | None]] = []
    table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    dropped: list[tuple[str, str]] = []
    done: set[str] = set()
    for key, tensor in tensors.items():
        slot = owner.get(key) or owner.get(key.replace(COUNTER, "running_mean"))
        if slot is not None:
            if slot.name not in done:
                done.add(slot.name)
                steps.append((slot.name, slot))
                weight, bias = slot.deploy_keys
                table[weight] = slot.squeezed.weight_shape, dtype
                table[bias] = (slot.squeezed.out_channels,), dtype
        elif reason := next((why for name, why in recognition.dropped.items() if inside(key, name)), None):
            dropped.append((key, reason))
        else:
            steps.append((key, None))
            table[key] = tensor.shape, dtype if tensor.dtype.is_floating_point else tensor.dtype
    checks: list[Check] = []
    read = reader(tensors)
    largest_change = 0.0
    with WeightsWriter(path, table) as writer, gates.exact_arithmetic():
        for name, slot in each(progress, "fusing and proving blocks", steps):
            if slot is None:
                writer.write(name, _copied(name, tensors[name], table[name][1], recognition.plan is not None))
                continue
            expression = slot.describe(read, facts, keys)
            try:
                fused = expression.squeeze().zero_filled()
            except CannotSqueeze as reason:
                raise CannotSqueeze(f"block {name or '(the whole file)'}: {reason}", hint=reason.hint) from reason
            checks.append(gates.algebra(name, expression, fused, request.seed))
            if recognition.plan is None and _assumes_eps(facts, name):
                largest_change = max(largest_change, _change_at(slot, read, facts, tensors, fused))
            weight, bias = slot.deploy_keys
            writer.write(weight, fused.weight.to(dtype))
            writer.write(bias, _bias(fused).to(dtype))
    warnings = []
    if largest_change:
        warnings.append(
            f"eps = {NORM_EPS:g} is an assumption, no file or option states it: at {YOLO_EPS:g} (YOLO's value) the kernels "
            f"would change by up to {largest_change:.1%}; state it with --set eps=VALUE"
        )
    copied = tuple(name for name, slot in steps if slot is None)
    return _Fused(tuple(checks), copied, tuple(dropped), writer.sha256, tuple(warnings))


def _prove_network(
    weights: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    facts: Facts,
    families: Sequence[Family],
    expect: Path | None,
    seed: int,
    progress: Progress,
) -> tuple[list[Check], Tensor, Tensor]:
    """Gates 2, 3 and 5 on the written file, and the anchor. Returns the checks, the images and the float64 reference."""
    steps = iter(range(5))

    def step(what: str) -> None:
        progress(what, next(steps), 5)

    read = reader(checkpoint.tensors)
    step("building both networks in float64")
    training = build(plan, checkpoint.tensors, read, facts, squeezed=False, dtype=torch.float64)
    fused = build(plan, checkpoint.tensors, read, facts, squeezed=True, dtype=torch.float64)
    images = gates.gate_images(plan.gate_shape, seed)
    step("running both networks in float64")
    network_check, reference = gates.network_gate(training, fused, images)
    checks = [network_check]
    if expect is not None:
        checks.append(gates.expectation(training, _arrays(expect)))
    step("comparing the written file bit for bit")
    written = read_safetensors(weights)
    checks.append(gates.stored_gate(_stored_pairs(fused, written)))
    del fused
    step("running both networks in float32")
    deploy = rebuilt(written, families, facts.record(), plan.gate_shape, squeezed=True)
    checks.append(gates.rounding_gate(training.float(), deploy, images, reference))
    progress("running both networks in float32", 5, 5)
    return checks, images, reference


def _stored_pairs(fused: torch.nn.Module, written: Mapping[str, StoredTensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    for name, exact in fused.state_dict().items():
        if name in written:
            yield name, exact, written[name].read()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="--expect takes an .npz with the arrays input and output")
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, TypeError, EOFError) as reason:
        raise InputError(f"{path.name} is no .npz file of plain arrays: {reason}", hint="write it with np.savez") from reason


def _copied(key: str, tensor: StoredTensor, dtype: torch.dtype, must_be_finite: bool) -> Tensor:
    values = tensor.read()
    if dtype not in NAMES:
        raise InputError(f"{key} has type {str(dtype).removeprefix('torch.')}, which a .safetensors file cannot hold")
    if must_be_finite and values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
        raise not_finite(key, values)
    return values.to(dtype)


def _bias(conv: Conv) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _assumes_eps(facts: Facts, name: str) -> bool:
    return any(fact.name == "eps" and fact.origin == "default" and name in fact.scopes for fact in facts.record())


def _change_at(slot: Slot, read: Callable[[str], Tensor], facts: Facts, tensors: Table, fused: Conv) -> float:
    """How much the kernel would change, relative to its largest entry, with YOLO's eps."""
    other = Facts((*facts.settings, Setting("", "eps", YOLO_EPS)), facts.attributes)
    changed: Linear = slot.describe(read, other, keys_of(tensors))
    return gates.relative_error(changed.squeeze().weight, fused.weight)


def _parameters(tensors: Table, keys: Iterable[str]) -> int:
    """Trained numbers: running statistics and counters are none."""
    statistics = ("running_mean", "running_var", COUNTER)
    return sum(tensors[key].elements for key in keys if key.rpartition(".")[2] not in statistics)


def _block_report(slot: Slot, tensors: Table, residual: float | None) -> BlockReport:
    fused = slot.squeezed
    after = math.prod(fused.weight_shape) + fused.out_channels
    return BlockReport(
        name=slot.name,
        family=slot.family,
        formula=slot.formula,
        kernel=fused.weight_shape,
        groups=fused.groups,
        parameters_before=_parameters(tensors, slot.consumed),
        parameters_after=after if slot.form == "training" else _parameters(tensors, slot.consumed),
        source_keys=slot.consumed,
        deploy_keys=slot.deploy_keys,
        residual=residual,
    )


def _describe_only(
    checkpoint: Checkpoint, recognition: Recognition, facts: Facts, hashing: Digest, request: Request
) -> Manifest:
    """What would be converted, without numbers of a proof: a dry run, or a file that is fused already."""
    reports, before, after = describe_blocks(checkpoint, recognition)
    plan = recognition.plan
    return Manifest(
        source=source_record(checkpoint, hashing.result()), family=recognition.family, families=recognition.families,
        architecture=recognition.architecture, skeleton=plan.skeleton.name if plan else None,
        input_shape=_input_shape(plan, request), gate_shape=plan.gate_shape if plan else (), facts=facts.record(),
        blocks=reports, copied=(), dropped=tuple(recognition.dropped.items()), parameters_before=before,
        parameters_after=after, verdict=Verdict(False, "blocks only", ()), training={}, weights_sha256="",
        references_sha256=None, command=request.command, tools=tool_versions(), notes=recognition.notes,
    )  # fmt: skip


def _report_failure(folder: Path, target: Path, manifest: Manifest, request: Request) -> None:
    kept = ""
    if request.keep_failed:
        write_text(folder / MANIFEST_FILE, to_json(manifest))
        failed = target.with_name(target.name.removesuffix(SUFFIX) + ".failed" + SUFFIX)
        if failed.exists():
            raise UsageError(f"{failed} exists already", hint="remove it and convert again")
        folder.rename(failed)
        kept = f"; the failed bundle is {failed}"
    first = manifest.verdict.failures[0]
    what = first.failure or f"error {first.error:.3g}, budget {first.budget:.3g} ({first.measure})"
    anchored = first.gate == "anchor"
    raise VerificationFailed(
        f"verification failed at gate '{first.gate}', {first.subject}: {what}; no bundle was written{kept}",
        hint="the recorded outputs and this description differ: check eps, stride and input preprocessing with --set, or --arch"
        if anchored
        else "please report this with the checkpoint's key names; --keep-failed keeps the result for a look",
    )


def _keep_artifacts(target: Path, folder: Path, existing: Manifest, manifest: Manifest) -> Manifest:
    """Take over what was exported from the very same weights; the rest is stale and goes."""
    if existing.weights_sha256 != manifest.weights_sha256:
        return manifest
    for artifact in existing.artifacts:
        source = target / artifact.file
        if source.is_file() and digest(source) == artifact.sha256:
            source.rename(folder / artifact.file)
            manifest = manifest.with_artifact(artifact)
    if (target / BENCH).is_file():
        (target / BENCH).rename(folder / BENCH)
    return manifest


def _input_shape(plan: Plan | None, request: Request) -> tuple[int, ...]:
    if request.input_shape is not None or plan is None:
        return request.input_shape or ()
    return 1, plan.channels, plan.skeleton.side, plan.skeleton.side


def _image(shape: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    _, channels, height, width = shape
    return channels, height, width


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")

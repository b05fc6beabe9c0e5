"""Fuse a checkpoint into a bundle, and prove it: load, recognise, squeeze block by block, gates, write.

Fusing streams: one block's tensors are in memory at a time, and reading, squeezing, hashing and writing overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.algebra import NORM_EPS, Conv, Linear
from repdeploy.bundle import REFERENCES, WEIGHTS, save_references
from repdeploy.checkpoint import Checkpoint, StoredTensor
from repdeploy.delivery import Request, deliver, recorded
from repdeploy.digest import Digest, digest
from repdeploy.errors import InputError
from repdeploy.facts import Facts, Setting
from repdeploy.family import Family, Read
from repdeploy.inspection import describe_blocks, is_parameter, parameters, recognised, source_record
from repdeploy.keys import Keys, inside
from repdeploy.network import squeeze
from repdeploy.progress import Progress, each
from repdeploy.proof import prove_network
from repdeploy.pruning import Thinned, gives_up, thin
from repdeploy.rebuild import not_finite, reader
from repdeploy.recognise import COUNTER, Recognition, Slot, Table, keys_of
from repdeploy.records import (
    ASSUMED,
    Check,
    Conversion,
    Grade,
    Manifest,
    NoMatch,
    TensorShape,
    Verdict,
)  # fmt: skip
from repdeploy.versions import tool_versions
from repdeploy.weights_file import NAMES, WeightsWriter

YOLO_EPS = 1e-3
"""YOLOv6 and v7 use RepVGG's keys with this eps; where nobody states eps, the report says how much it would change."""
MAX_REASONS = 3
"""Networks whose reason not to fit is spelled out; inspect has them all."""


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
    expect = recorded(request.expect)
    if expect is not None and request.input_shape is None:
        request = replace(request, input_shape=(1, *expect["input"].shape[1:]))
    progress("recognising", 0, 1)
    recognition, facts = recognised(
        checkpoint, families, request.family, request.arch, request.settings, _image(request.input_shape)
    )
    if recognition.plan is None:
        failed = [item for item in recognition.skeletons if isinstance(item, NoMatch)]
        reasons = [f"no known network: {item.family} does not fit: {item.reason}" for item in failed[:MAX_REASONS]]
        if len(failed) > MAX_REASONS:
            reasons.append(f"no known network: nor does any of {', '.join(item.family for item in failed[MAX_REASONS:])}")
        recognition = replace(recognition, notes=(*recognition.notes, *reasons))
    recognition, thinned = _thinned(checkpoint, recognition, facts, request)
    described = _described(checkpoint, recognition, facts, thinned, hashing, request)
    fusable = any(slot.form == "training" for slot in recognition.slots)
    if not fusable and not (thinned and thinned.report.removed):
        return Conversion(None, described, already_deployed=True)
    if request.dry_run:
        return Conversion(None, described)
    return deliver(
        target,
        described,
        lambda folder: _fill(folder, checkpoint, recognition, facts, thinned, described, families, request, expect, progress),
        request,
    )


def _thinned(
    checkpoint: Checkpoint, recognition: Recognition, facts: Facts, request: Request
) -> tuple[Recognition, Thinned | None]:
    """What leaves the network, and the network without it. Raises InputError where that was asked for, and none is known."""
    plan = recognition.plan
    if plan is None:
        if request.prune_dead:
            raise InputError(
                "--prune-dead needs the network around the blocks, which is not known here: nothing tells what reads a channel",
                hint="leave --prune-dead out: the blocks are fused and proved one by one",
            )
        given_up = sum(slot.kind.gives_up is not None for slot in recognition.slots)
        note = f"{given_up} blocks may have rows to lose and none of their rows is removed: what reads them is not known here"
        return (replace(recognition, notes=(*recognition.notes, note)) if given_up else recognition), None
    if not (request.prune_dead or gives_up(plan)):
        return recognition, None
    image = _image(request.input_shape) or plan.usual_shape
    with gates.exact_arithmetic():
        thinned = thin(plan, reader(checkpoint.tensors), facts, image, dead=request.prune_dead)
    narrower = tuple(thinned.plan.slots[slot.name] for slot in recognition.slots)
    return replace(recognition, plan=thinned.plan, slots=narrower), thinned


def _described(
    checkpoint: Checkpoint,
    recognition: Recognition,
    facts: Facts,
    thinned: Thinned | None,
    hashing: Digest,
    request: Request,
) -> Manifest:
    """The manifest before anything was proved or written: all that a dry run has to say."""
    reports, before, after = describe_blocks(checkpoint, recognition)
    if thinned is not None:
        narrowed, gone = thinned.stored(reader(checkpoint.tensors))
        after += sum(tensor.numel() for key, tensor in narrowed.items() if is_parameter(key))
        after -= parameters(checkpoint.tensors, [key for key in (*narrowed, *gone) if key in checkpoint.tensors])
    plan, recorded = recognition.plan, facts.record()
    shape = request.input_shape or ((1, *plan.usual_shape) if plan else ())
    return Manifest(
        source=source_record(checkpoint, hashing.result()),
        family=recognition.family,
        families=recognition.families,
        architecture=recognition.architecture,
        skeleton=plan.skeleton.name if plan else None,
        input_shape=shape,
        gate_shape=plan.gate_shape if plan else (),
        facts=recorded,
        blocks=reports,
        copied=(),
        dropped=tuple(recognition.dropped.items()),
        parameters_before=before,
        parameters_after=after,
        verdict=Verdict(False, "blocks only", (), tuple(fact for fact in recorded if fact.origin in ASSUMED)),
        training={key: TensorShape(t.shape, str(t.dtype).removeprefix("torch.")) for key, t in checkpoint.tensors.items()},
        weights_sha256="",
        references_sha256=None,
        command=request.command,
        tools=tool_versions(),
        notes=recognition.notes,
        norms=tuple(plan.norms.items()) if plan else (),
        pruning=thinned.report if thinned else None,
    )


def _fill(
    folder: Path,
    checkpoint: Checkpoint,
    recognition: Recognition,
    facts: Facts,
    thinned: Thinned | None,
    described: Manifest,
    families: Sequence[Family],
    request: Request,
    expect: dict[str, np.ndarray] | None,
    progress: Progress,
) -> Manifest:
    """Write weights and references into a folder and return what the manifest will say."""
    plan = recognition.plan
    if expect is not None and (plan is None or request.gates == "blocks"):
        raise InputError(
            "--expect compares whole networks, and "
            + ("--gates blocks leaves them out" if plan else "only blocks are known here"),
            hint="leave --expect out" + (" or use --gates all" if plan else ""),
        )
    fused = _fuse(folder / WEIGHTS, checkpoint, recognition, facts, thinned, request, progress)
    checks, references_sha256 = list(fused.checks), None
    grade: Grade = "blocks only"
    if plan is not None and request.gates == "all":
        proof = prove_network(folder / WEIGHTS, checkpoint, plan, facts, families, thinned, expect, request.seed, progress)
        checks += proof.checks
        grade = "anchored" if proof.is_anchored else "self-consistent"
        if described.pruning is not None:
            described = replace(described, pruning=replace(described.pruning, cost=proof.pruning_cost))
            fused = replace(fused, warnings=(*fused.warnings, *_pruning_warnings(proof.pruning_cost)))
        save_references(folder / REFERENCES, {plan.gate_shape: (proof.images.numpy(), proof.reference.numpy())})
        references_sha256 = digest(folder / REFERENCES)
    residuals = {check.subject: check.error for check in fused.checks}
    return replace(
        described,
        blocks=tuple(replace(report, residual=residuals.get(report.name)) for report in described.blocks),
        copied=fused.copied,
        dropped=fused.dropped,
        verdict=replace(
            described.verdict,
            passed=all(check.passed for check in checks),
            grade=grade,
            checks=tuple(checks),
            warnings=fused.warnings,
        ),
        weights_sha256=fused.sha256,
        references_sha256=references_sha256,
    )


def _pruning_warnings(cost: float | None) -> tuple[str, ...]:
    if cost is None or cost <= gates.LOSSLESS:
        return ()
    return (
        f"the channels that left were not at zero: without them the training-time outputs change by {cost:.1%}, so this is not "
        "the network that was trained; a lower --set threshold keeps more of them",
    )


@dataclass(frozen=True, slots=True)
class _Fused:
    checks: tuple[Check, ...]
    copied: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    sha256: str
    warnings: tuple[str, ...]


def _fuse(
    path: Path,
    checkpoint: Checkpoint,
    recognition: Recognition,
    facts: Facts,
    thinned: Thinned | None,
    request: Request,
    progress: Progress,
) -> _Fused:
    """Squeeze and prove block by block (gate 1), and stream the deploy state dict."""
    dtype: torch.dtype = getattr(torch, request.dtype)
    tensors, keys = checkpoint.tensors, keys_of(checkpoint.tensors)
    owner = {key: slot for slot in recognition.slots if slot.form == "training" for key in (*slot.consumed, *slot.unread_keys)}
    steps: list[tuple[str, Slot | None]] = []
    table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    dropped: list[tuple[str, str]] = []
    done: set[str] = set()
    narrowed, gone = thinned.stored(reader(tensors)) if thinned else ({}, set())
    for key, tensor in tensors.items():
        slot = owner.get(key) or owner.get(key.replace(COUNTER, "running_mean"))
        if slot is not None:
            if slot.label not in done:
                done.add(slot.label)
                steps.append((slot.label, slot))
                weight, bias = slot.deploy_keys
                _one_form_only(slot, tensors)
                table[weight] = slot.weight_shape, dtype
                table[bias] = (slot.squeezed.out_channels,), dtype
        elif key in narrowed:
            steps.append((key, None))
            table[key] = tuple(narrowed[key].shape), dtype
        elif key in gone or key.replace(COUNTER, "running_mean") in gone:
            continue  # in its convolution, which lost channels
        elif reason := next((why for name, why in recognition.dropped.items() if inside(key, name)), None):
            dropped.append((key, reason))
        else:
            steps.append((key, None))
            table[key] = tensor.shape, dtype if tensor.dtype.is_floating_point else tensor.dtype
    for key in [key for key in narrowed if key not in tensors]:  # a bias that took in a constant
        steps.append((key, None))
        table[key] = tuple(narrowed[key].shape), dtype
    checks: list[Check] = []
    read = reader(tensors)
    changes: dict[float, float] = {}
    assuming = set() if recognition.plan is not None else _assuming_eps(facts)
    with WeightsWriter(path, table) as writer, gates.exact_arithmetic():
        for name, slot in each(progress, "fusing and proving blocks", steps):
            if slot is None and name in narrowed:
                writer.write(name, narrowed[name].to(dtype))
                continue
            if slot is None:
                writer.write(name, _copied(name, tensors[name], table[name][1], recognition.plan is not None))
                continue
            expression = slot.describe(read, facts, keys)
            fused = squeeze(name, expression)
            checks.append(gates.algebra(name, expression, fused, request.seed))
            if slot.name in assuming:
                assumed = slot.kind.eps
                changes[assumed] = max(changes.get(assumed, 0.0), _change_at(slot, read, facts, keys, fused))
            if thinned is not None:
                fused = thinned.fused(slot)
            weight, bias = slot.deploy_keys
            writer.write(weight, fused.weight.view(slot.weight_shape).to(dtype))
            writer.write(bias, fused.bias_or_zero().to(dtype))
    warnings = [
        f"eps = {assumed:g} is an assumption, no file or option states it: at {_other_eps(assumed):g} "
        f"({'the default of torch' if assumed == YOLO_EPS else 'the value of YOLO'}) the kernels would change by up to "
        f"{change:.1%}; state it with --set eps=VALUE"
        for assumed, change in changes.items()
        if change
    ]
    copied = tuple(name for name, slot in steps if slot is None)
    return _Fused(tuple(checks), copied, tuple(dropped), writer.sha256, tuple(warnings))


def _copied(key: str, tensor: StoredTensor, dtype: torch.dtype, must_be_finite: bool) -> Tensor:
    values = tensor.read()
    if dtype not in NAMES:
        raise InputError(f"{key} has type {str(dtype).removeprefix('torch.')}, which a .safetensors file cannot hold")
    if must_be_finite and values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
        raise not_finite(key, values)
    return values.to(dtype)


def _assuming_eps(facts: Facts) -> set[str]:
    """The blocks whose eps nobody states."""
    return {scope for fact in facts.record() if fact.name == "eps" and fact.origin == "default" for scope in fact.scopes}


def _one_form_only(slot: Slot, tensors: Table) -> None:
    """Raises InputError where a block is there in its training form and fused as well."""
    both = next((key for key in slot.deploy_keys if key in tensors and key not in slot.consumed), None)
    if both is not None:
        raise InputError(
            f"block {slot.name or '(the whole file)'} has its branches and {both} as well: only one of them can be right",
            hint="save the state dict of the training-time model, or of the deploy model, not of both",
        )


def _other_eps(assumed: float) -> float:
    return NORM_EPS if assumed == YOLO_EPS else YOLO_EPS


def _change_at(slot: Slot, read: Read, facts: Facts, keys: Keys, fused: Conv) -> float:
    """How much the kernel would change, relative to its largest entry, with the other usual eps."""
    other = Facts((*facts.settings, Setting("", "eps", _other_eps(slot.kind.eps))), facts.attributes)
    changed: Linear = slot.describe(read, other, keys)
    return gates.relative_error(changed.squeeze().weight, fused.weight)


def _image(shape: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    _, channels, height, width = shape
    return channels, height, width

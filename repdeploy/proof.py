"""Whole-network proof: the file that was written, rebuilt and held against the training-time network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.bundle import WEIGHTS, Bundle
from repdeploy.checkpoint import Checkpoint, StoredTensor
from repdeploy.checkpoint.other_files import read_safetensors
from repdeploy.facts import Facts, settings_of
from repdeploy.family import Family, Read
from repdeploy.network import describe, squeeze
from repdeploy.progress import Progress, each
from repdeploy.pruning import Thinned, thin
from repdeploy.rebuild import fact_kinds, reader, rebuilt
from repdeploy.recognise import Plan, keys_of, recognise
from repdeploy.records import Check


@dataclass(frozen=True, slots=True)
class NetworkProof:
    """`reference`: the float64 outputs of the training-time network for the images; `pruning_cost`: how far they are from those
    with every channel that training gave up, relative to the largest; None where there is none; `is_anchored`: whether recorded
    outputs speak for the deploy network too."""

    checks: list[Check]
    images: Tensor
    reference: Tensor
    pruning_cost: float | None
    is_anchored: bool


def prove_network(
    weights: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    facts: Facts,
    families: Sequence[Family],
    thinned: Thinned | None,
    expect: dict[str, np.ndarray] | None,
    seed: int,
    progress: Progress,
) -> NetworkProof:
    """Gates 2, 3 and 5 on the written file, and the anchor."""
    steps = iter(range(5))

    def step(what: str) -> None:
        progress(what, next(steps), 5)

    read = reader(checkpoint.tensors)
    step("building both networks in float64")
    description = describe(plan, read, facts)
    training = as_stored = description.network(squeezed=False, dtype=torch.float64)
    if thinned is not None and thinned.silenced:
        training = describe(plan, read, facts, thinned.silenced).network(squeezed=False, dtype=torch.float64)
    fused = (thinned.deploy() if thinned else description).network(squeezed=True, dtype=torch.float64)
    images = gates.gate_images(plan.gate_shape, seed)
    step("running both networks in float64")
    network_check, reference = gates.network_gate(training, fused, images)
    checks = [network_check]
    cost = None
    if training is not as_stored:
        checks[0] = replace(network_check, subject="float64, training-time with given-up channels at zero, against deploy")
        cost = gates.relative_error(reference, gates.run_in_chunks(as_stored, images.double()))
    is_anchored = False
    if expect is not None:
        anchor = gates.expectation(as_stored, expect)
        is_anchored = anchor.passed and (cost is None or cost <= gates.LOSSLESS)
        if cost is not None and not anchor.passed and (pruned := gates.expectation(training, expect)).passed:
            anchor, is_anchored = replace(pruned, subject=f"{pruned.subject}, given-up channels at zero"), True
        checks.append(anchor)
    step("comparing the written file bit for bit")
    written = read_safetensors(weights)
    checks.append(gates.stored_gate(_stored_pairs(plan, fused, thinned, written, read, facts)))
    del fused
    step("running both networks in float32")
    owners = {slot.family for slot in plan.slots.values()}
    deploy = rebuilt(written, families, facts.record(), plan.gate_shape, owners=owners, squeezed=True)
    checks.append(gates.rounding_gate(training.float(), deploy, images, reference))
    progress("running both networks in float32", 5, 5)
    return NetworkProof(checks, images, reference, cost, is_anchored)


def _stored_pairs(
    plan: Plan,
    fused: torch.nn.Module,
    thinned: Thinned | None,
    written: Mapping[str, StoredTensor],
    read: Read,
    facts: Facts,
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """What should be stored beside what is, for every block that was fused and every linear layer.

    Where a block's norms are stored apart, the network has them folded in, and the block is squeezed anew without them.
    """
    whole, narrowed = fused.state_dict(), thinned.stored(read)[0] if thinned else {}
    yield from ((key, tensor, written[key].read()) for key, tensor in narrowed.items())
    for slot in plan.slots.values():
        if slot.form == "kept" and slot.on_vector and slot.deploy_keys[0] not in narrowed:
            as_stored = slot.describe(read, facts, plan.keys).squeeze()
            for key, values in zip(slot.deploy_keys, (as_stored.weight, as_stored.bias), strict=True):
                if values is not None:
                    yield key, values.flatten(1) if values.dim() > 1 else values, written[key].read()
        if slot.form != "training":
            continue
        if len(slot.parts) == 1:
            exact = [whole.get(key) for key in slot.deploy_keys]
        else:
            conv = thinned.fused(slot) if thinned else squeeze(slot.label, slot.describe(read, facts, plan.keys))
            exact = [conv.weight, conv.bias]
        for key, values in zip(slot.deploy_keys, exact, strict=True):
            stored = written[key].read()
            yield key, (torch.zeros_like(stored, dtype=torch.float64) if values is None else values).view_as(stored), stored


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
    stated = (item for item in settings_of(manifest.facts, fact_kinds(families)) if item.origin != "file")
    facts = Facts(stated, checkpoint.attributes)
    image = (shape[1:] if shape else None) or (manifest.gate_shape or None)
    family = manifest.family if len(manifest.families) == 1 else None
    recognition = recognise(checkpoint.tensors, families, facts, family=family, input_shape=image)  # type: ignore[arg-type]
    # its family's name, which convert may not have been given, proves more blocks than were fused
    fused_then = {block.name for block in manifest.blocks}
    slots = [slot for slot in recognition.slots if slot.form == "training" and slot.label in fused_then]
    read, keys, written = reader(checkpoint.tensors), keys_of(checkpoint.tensors), bundle.tensors()
    checks: list[Check] = []
    plan, thinned = recognition.plan, None
    if plan is not None and manifest.pruning is not None:
        thinned = thin(plan, read, facts, manifest.input_shape[1:], dead=manifest.pruning.dead)  # type: ignore[arg-type]
        plan, slots = thinned.plan, [thinned.plan.slots[slot.name] for slot in slots]
    with gates.exact_arithmetic():
        for slot in each(progress, "proving blocks", slots):
            expression = slot.describe(read, facts, keys)
            fused = squeeze(slot.label, expression)
            checks.append(gates.algebra(slot.label, expression, fused, seed))
            fused = thinned.fused(slot) if thinned else fused
            exact = fused.weight.view(slot.weight_shape), fused.bias_or_zero()
            pairs = zip(slot.deploy_keys, exact, strict=True)
            stored = gates.stored_gate((key, exact, written[key].read()) for key, exact in pairs)
            checks.append(replace(stored, subject=slot.label))
    if plan is not None:
        weights = bundle.path / WEIGHTS
        checks += prove_network(weights, checkpoint, plan, facts, families, thinned, None, seed, progress).checks
    return checks

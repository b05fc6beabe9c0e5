"""Whole-network proof: the file that was written, rebuilt and held against the training-time network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from repdeploy.network import Description, describe, squeeze
from repdeploy.progress import Progress, each
from repdeploy.rebuild import fact_kinds, reader, rebuilt
from repdeploy.recognise import Plan, keys_of, recognise
from repdeploy.records import Check


def prove_network(
    weights: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    facts: Facts,
    families: Sequence[Family],
    expect: dict[str, np.ndarray] | None,
    seed: int,
    progress: Progress,
) -> tuple[list[Check], Tensor, Tensor]:
    """Gates 2, 3 and 5 on the written file, and the anchor. Returns the checks, the images and the float64 reference."""
    steps = iter(range(5))

    def step(what: str) -> None:
        progress(what, next(steps), 5)

    read = reader(checkpoint.tensors)
    step("building both networks in float64")
    description = describe(plan, checkpoint.tensors, read, facts)
    training = description.network(squeezed=False, dtype=torch.float64)
    fused = description.network(squeezed=True, dtype=torch.float64)
    images = gates.gate_images(plan.gate_shape, seed)
    step("running both networks in float64")
    network_check, reference = gates.network_gate(training, fused, images)
    checks = [network_check]
    if expect is not None:
        checks.append(gates.expectation(training, expect))
    step("comparing the written file bit for bit")
    written = read_safetensors(weights)
    checks.append(gates.stored_gate(_stored_pairs(description, fused, written, read, facts)))
    del fused
    step("running both networks in float32")
    deploy = rebuilt(written, families, facts.record(), plan.gate_shape, squeezed=True)
    checks.append(gates.rounding_gate(training.float(), deploy, images, reference))
    progress("running both networks in float32", 5, 5)
    return checks, images, reference


def _stored_pairs(
    description: Description,
    fused: torch.nn.Module,
    written: Mapping[str, StoredTensor],
    read: Read,
    facts: Facts,
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """What should be stored beside what is, for every block that was fused and every linear layer.

    Where a block's norms are stored apart, the network has them folded in, and the block is squeezed anew without them.
    """
    plan, whole = description.plan, fused.state_dict()
    for slot in plan.slots.values():
        if slot.form != "training":
            continue
        if len(slot.parts) == 1:
            exact = [whole.get(key) for key in slot.deploy_keys]
        else:
            conv = squeeze(slot.label, slot.describe(read, facts, plan.keys))
            exact = [conv.weight, conv.bias]
        for key, values in zip(slot.deploy_keys, exact, strict=True):
            stored = written[key].read()
            yield key, torch.zeros_like(stored, dtype=torch.float64) if values is None else values, stored
    for name in plan.linears:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in whole:
                yield key, whole[key], written[key].read()


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
    with gates.exact_arithmetic():
        for slot in each(progress, "proving blocks", slots):
            expression = slot.describe(read, facts, keys)
            fused = squeeze(slot.label, expression)
            checks.append(gates.algebra(slot.label, expression, fused, seed))
            pairs = zip(slot.deploy_keys, (fused.weight, fused.bias_or_zero()), strict=True)
            stored = gates.stored_gate((key, exact, written[key].read()) for key, exact in pairs)
            checks.append(replace(stored, subject=slot.label))
    if recognition.plan is not None:
        weights = bundle.path / WEIGHTS
        checks += prove_network(weights, checkpoint, recognition.plan, facts, families, None, seed, progress)[0]
    return checks

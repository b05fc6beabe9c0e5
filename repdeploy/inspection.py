"""What a checkpoint holds, from names and shapes: its blocks, its network, the facts that were used; no numbers are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from repdeploy.checkpoint import Checkpoint
from repdeploy.checkpoint.load import printable
from repdeploy.digest import Digest
from repdeploy.diversity import diversity
from repdeploy.errors import UsageError
from repdeploy.facts import Facts, parse_settings
from repdeploy.family import Family
from repdeploy.keys import inside
from repdeploy.progress import Progress, each
from repdeploy.rebuild import fact_kinds, reader
from repdeploy.recognise import COUNTER, Recognition, Slot, Table, arch_settings, keys_of, recognise
from repdeploy.records import BlockBranches, BlockReport, Inspection, Source


def inspect(
    checkpoint: Checkpoint,
    hashing: Digest,
    families: Sequence[Family],
    family: str | None,
    arch: str | None,
    settings: Iterable[str],
    branches: bool,
    progress: Progress,
) -> Inspection:
    """The whole answer of `repdeploy inspect`; `branches` reads the blocks' numbers too. Raises the errors of `recognised`."""
    found, facts = recognised(checkpoint, families, family, arch, settings)
    reports, before, after = describe_blocks(checkpoint, found)
    used = {key for slot in found.slots for key in slot.consumed}
    outside = () if found.plan else tuple(key for key in checkpoint.tensors if key not in used and not key.endswith(COUNTER))
    return Inspection(
        branches=_branches(checkpoint, found, facts, progress) if branches else (),
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


def recognised(
    checkpoint: Checkpoint,
    families: Sequence[Family],
    family: str | None,
    arch: str | None,
    settings: Iterable[str],
    image: tuple[int, int, int] | None = None,
) -> tuple[Recognition, Facts]:
    """Recognise a checkpoint with what the user stated; the facts know what was used.

    Raises UsageError for a --set or --arch that means nothing here, and the errors of `recognise`.
    """
    official, settled = arch_settings(arch, checkpoint.architecture, families)
    facts = Facts((*parse_settings(settings, fact_kinds(families)), *settled), checkpoint.attributes)
    found = recognise(
        checkpoint.tensors,
        families,
        facts,
        family=family,
        stored_name=checkpoint.architecture,
        arch=official,
        input_shape=image,
    )
    for setting in facts.unused():  # a typo must not pass for an answer
        raise UsageError(
            f"--set {setting.scope + '.' if setting.scope else ''}{setting.name}={setting.value} changed nothing",
            hint=f"blocks here are {_some(slot.name or '(root)' for slot in found.slots)}; "
            f"facts they read: {', '.join(sorted({fact.name for fact in facts.record()}))}",
        )
    return found, facts


def describe_blocks(checkpoint: Checkpoint, recognition: Recognition) -> tuple[tuple[BlockReport, ...], int, int]:
    """Every block from its shapes alone, and the parameters before and after."""
    reports = tuple(_block_report(slot, checkpoint.tensors) for slot in recognition.slots)
    unread = {key for slot in recognition.slots for key in slot.unread_keys}
    before = parameters(checkpoint.tensors, [key for key in checkpoint.tensors if key not in unread])
    gone = [key for key in checkpoint.tensors if any(inside(key, name) for name in recognition.dropped)]
    after = before - parameters(checkpoint.tensors, gone) - sum(r.parameters_before - r.parameters_after for r in reports)
    return reports, before, after


def _branches(checkpoint: Checkpoint, found: Recognition, facts: Facts, progress: Progress) -> tuple[BlockBranches, ...]:
    read, keys = reader(checkpoint.tensors), keys_of(checkpoint.tensors)
    slots = [slot for slot in found.slots if slot.form == "training"]
    steps = each(progress, "comparing branches", slots)
    return tuple(diversity(slot.label, slot.describe(read, facts, keys)) for slot in steps)


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


def parameters(tensors: Table, keys: Iterable[str]) -> int:
    """Trained numbers: running statistics and counters are none."""
    return sum(tensors[key].elements for key in keys if is_parameter(key))


def is_parameter(key: str) -> bool:
    return key.rpartition(".")[2] not in ("running_mean", "running_var", COUNTER)


def _block_report(slot: Slot, tensors: Table) -> BlockReport:
    fused = slot.squeezed
    after = math.prod(fused.weight_shape) + fused.out_channels
    return BlockReport(
        name=slot.label,
        family=slot.family,
        formula=slot.formula,
        kernel=fused.weight_shape,
        groups=fused.groups,
        parameters_before=parameters(tensors, slot.consumed),
        parameters_after=after if slot.form == "training" else parameters(tensors, slot.consumed),
        source_keys=slot.consumed,
        deploy_keys=slot.deploy_keys,
        residual=None,
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")

"""Channels leave a fused network: those that a family's training has driven to zero and, on request, all that are dead.

What reads a channel that leaves is narrowed with it (`channels`), so the rest of the network computes the same. Source: ResRep
(arXiv:2007.03260, section 3.4) for the rows; RepVGG (arXiv:2101.03697, section 3.2) for why a single branch can be thinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from repdeploy.algebra import Channelwise, Conv, Linear
from repdeploy.channels import Channels, Unit, dispensable, leaving, narrowed, quiet, staying
from repdeploy.facts import Facts
from repdeploy.family import NORM, SCALES, Block, Read
from repdeploy.keys import join
from repdeploy.network import Description, squeeze
from repdeploy.recognise import Plan, Slot
from repdeploy.records import PrunedLayer, Pruning


@dataclass(frozen=True, slots=True)
class Thinned:
    """A plan without the channels that leave.

    `silenced`: per slot, which outputs (out,) of the training-time network count as zero; `convs`: per unit, what it equals
    now; `stays`: per unit, which of its channels stay on either side; `report`: for the manifest.
    """

    plan: Plan
    silenced: Mapping[str, Tensor]
    convs: Mapping[Unit, Conv]
    stays: Mapping[Unit, tuple[Tensor, Tensor]]
    report: Pruning

    def deploy(self) -> Description:
        """The fused network on the channels that stay."""
        slots = self.plan.slots.items()
        parts: dict[str, list[Linear]] = {name: [self.convs[name, part.name] for part in slot.parts] for name, slot in slots}
        return Description(self.plan, {name: reduce(Linear.__rshift__, convs) for name, convs in parts.items()})

    def fused(self, slot: Slot) -> Conv:
        return self.convs[slot.name, slot.name]

    def stored(self, read: Read) -> tuple[dict[str, Tensor], set[str]]:
        """Of layers that are not fused, where they are narrowed: their tensors now, and the keys that are no longer there."""
        found: dict[str, Tensor] = {}
        consumed: set[str] = set()
        for slot in self.plan.slots.values():
            for part in slot.parts:
                unit = slot.name, part.name
                inputs, outputs = self.stays[unit]
                if part.form == "training" or (bool(inputs.all()) and bool(outputs.all())):
                    continue
                consumed |= {*part.consumed}
                if part.kind is NORM or part.kind in SCALES:
                    found |= {key: _rows(read(key), outputs) for key in part.consumed}
                    continue
                conv, weight = self.convs[unit], join(part.name, part.kind.anchor)
                found[weight] = conv.weight.flatten(1) if part.kind.is_dense else conv.weight
                if conv.bias is not None:
                    found[f"{weight.removesuffix('weight')}bias"] = conv.bias
        return found, consumed - set(found)


def gives_up(plan: Plan) -> bool:
    """Whether a block of this network can tell which of its outputs training has given up."""
    return any(slot.form == "training" and slot.kind.gives_up for slot in plan.slots.values())


def thin(plan: Plan, read: Read, facts: Facts, image: tuple[int, int, int], *, dead: bool) -> Thinned:
    """Fuse a network and take out what its blocks give up; `dead`: then every channel that is a constant, or that nobody reads.

    `image`: (channels, height, width), for the estimates. Raises CannotSqueeze, InputError.
    """
    convs = {
        (slot.name, part.name): _squeezed(slot, part, plan, read, facts) for slot in plan.slots.values() for part in slot.parts
    }
    given_up, notes = _given_up(plan, read, facts)
    silenced = given_up
    while True:
        channels = Channels(plan, convs | {unit: _without(convs[unit], rows) for unit, rows in silenced.items()})
        channels.read(image)
        gone = leaving(channels, dispensable(channels, silenced))
        left = {met.unit: ~staying(channels.classes, met.outputs, gone) for met in channels.met if met.unit in silenced}
        kept = {unit: rows & ~left[unit] for unit, rows in silenced.items()}
        if not any(rows.any() for rows in kept.values()):
            break
        silenced = {unit: rows & left[unit] for unit, rows in silenced.items()}  # a row that has to stay is no zero
    if dead:
        channels, gone = _without_dead(plan, channels, image)
    stays = {
        met.unit: (staying(channels.classes, met.inputs, gone), staying(channels.classes, met.outputs, gone))
        for met in channels.met
    }
    thinned = {met.unit: narrowed(met, *stays[met.unit]) for met in channels.met}
    return Thinned(
        _narrower(plan, thinned),
        {slot: rows for (slot, _), rows in silenced.items() if rows.any()},
        thinned,
        stays,
        _report(plan, channels, thinned, dead, (*notes, *_put_back(given_up, silenced))),
    )


def _without_dead(plan: Plan, channels: Channels, image: tuple[int, int, int]) -> tuple[Channels, set[int]]:
    """The network, read again until no channel dies of another one's leaving, and the classes that leave it."""
    while True:
        free = dispensable(channels)
        quieter = {met.unit: quiet(met, staying(channels.classes, met.outputs, free)) for met in channels.met if met.is_full}
        if all(torch.equal(conv.weight, channels.convs[unit].weight) for unit, conv in quieter.items()):
            return channels, leaving(channels, free)
        channels = Channels(plan, {**channels.convs, **quieter})
        channels.read(image)


def _put_back(given_up: Mapping[Unit, Tensor], silenced: Mapping[Unit, Tensor]) -> tuple[str, ...]:
    """Of the rows that training gave up, those that have to stay."""
    back = {unit[0]: int((rows & ~silenced[unit]).sum()) for unit, rows in given_up.items()}
    return tuple(
        f"{slot}: of the outputs it gave up {count} stay, as they are stored: a sum, or what reads them, needs their channels"
        for slot, count in back.items()
        if count
    )


def _rows(values: Tensor, stays: Tensor) -> Tensor:
    """One number per channel, in whatever shape, of the channels that stay."""
    kept = values.flatten()[stays]
    return kept.view([len(kept) if size == len(stays) else size for size in values.shape])


def _squeezed(slot: Slot, part: Slot, plan: Plan, read: Read, facts: Facts) -> Conv:
    described = part.describe(read, facts, plan.keys)
    if part is slot.before and slot.positions > 1:
        assert isinstance(described, Channelwise)
        described = described.repeated(slot.positions)
    return squeeze(part.name, described)


def _given_up(plan: Plan, read: Read, facts: Facts) -> tuple[dict[Unit, Tensor], tuple[str, ...]]:
    """The outputs (out,) that training has given up, and what is to be said about them."""
    found, notes = {}, []
    for slot in plan.slots.values():
        if slot.form == "training" and slot.kind.gives_up is not None:
            rows, note = slot.kind.gives_up(Block(slot.name, slot.kind, plan.keys, read, facts, slot.place))
            found[slot.name, slot.name] = rows
            notes += [f"{slot.name}: {note}"] if note else []
    return found, tuple(notes)


def _without(conv: Conv, rows: Tensor) -> Conv:
    """The convolution with these outputs (out,) at zero."""
    stays = (~rows).to(conv.weight.dtype)
    return replace(conv, weight=conv.weight * stays.view(-1, 1, 1, 1), bias=None if conv.bias is None else conv.bias * stays)


def _narrower(plan: Plan, convs: Mapping[Unit, Conv]) -> Plan:
    """The same plan, its slots as wide as their convolutions are now."""

    def narrower(slot: Slot, part: Slot) -> Slot:
        return replace(part, squeezed=convs[slot.name, part.name].geometry)

    slots = {
        name: replace(
            narrower(slot, slot),
            before=None if slot.before is None else narrower(slot, slot.before),
            behind=None if slot.behind is None else narrower(slot, slot.behind),
        )
        for name, slot in plan.slots.items()
    }
    return replace(plan, slots=slots)


def _report(plan: Plan, channels: Channels, thinned: Mapping[Unit, Conv], dead: bool, notes: tuple[str, ...]) -> Pruning:
    """Of the fused network before and after; multiplications and additions of its convolutions count, norms do not."""
    own = [met for met in channels.met if met.unit[0] == met.unit[1] and met.unit[0] not in plan.norms]
    after = [thinned[met.unit] for met in own]
    changed = [(met, conv) for met, conv in zip(own, after, strict=True) if conv.out_channels < met.conv.out_channels]
    return Pruning(
        layers=tuple(PrunedLayer(met.unit[0], met.conv.out_channels, conv.out_channels) for met, conv in changed),
        flops_before=sum(2 * met.conv.weight.numel() * met.places for met in own),
        flops_after=sum(2 * conv.weight.numel() * met.places for met, conv in zip(own, after, strict=True)),
        parameters_before=sum(_parameters(met.conv) for met in own),
        parameters_after=sum(map(_parameters, after)),
        dead=dead,
        notes=notes,
    )


def _parameters(conv: Conv) -> int:
    return conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())

"""Which family and which network a table of tensors is, found out from names and shapes alone.

A skeleton is recognised when its run on shapes succeeds and consumes every tensor. Where no skeleton fits, the blocks
whose anchors are unmistakable are still found, one by one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from repdeploy.algebra import Channelwise, Geometry, Linear, Pair, Scale
from repdeploy.checkpoint import StoredTensor
from repdeploy.errors import CannotSqueeze, IllegalInput, InputError, NotRecognised, UsageError
from repdeploy.facts import Facts, Setting
from repdeploy.family import DENSE, NORM, PLAIN, SCALES, Block, BlockKind, Family, Place, Read
from repdeploy.keys import Keys, inside, join
from repdeploy.records import Fact, Match, NoMatch, Origin
from repdeploy.skeletons import Architecture, Skeleton

Table = Mapping[str, StoredTensor]
Shape = tuple[int, int, int]
"""(channels, height, width)"""

COUNTER = "num_batches_tracked"
"""Batch norm's own counter: no number of the network."""
SIDES = (9, 17, 33, 65, 97, 129, 161, 193, 225, 257, 321, 385)
MAX_ANCHORS = 2
"""Of a family that does not match, the keys that are named."""
CONVERTED_ALREADY = "it has no batch norm: if it is converted already there is nothing to do, and --family NAME says so"
LAST_MAP = 3
"""Gates want a last map of at least this height and width, so that it has an interior."""

Form = Literal["training", "deployed", "kept"]
"""A block that will be fused, one that was, and layers that the official deploy model keeps as they are stored."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a network and the block found there.

    `before`, `behind`: batch norms and scales that are stored under names of their own and belong to it when it runs;
    `positions`: places that share a channel of the norm before it; `on_vector`: its input has no height and width.
    """

    name: str
    family: str
    kind: BlockKind
    form: Form
    place: Place
    consumed: tuple[str, ...]
    formula: str
    squeezed: Geometry
    before: Slot | None = None
    behind: Slot | None = None
    positions: int = 1
    on_vector: bool = False

    @property
    def label(self) -> str:
        """A name that no other block has: several blocks may share the prefix they were found under."""
        return self.deploy_module if self.kind.one_of_several else self.name

    @property
    def deploy_module(self) -> str:
        """Where the squeezed convolution goes."""
        return join(self.name, self.kind.deploys_as or "")

    @property
    def deploy_keys(self) -> tuple[str, str]:
        return join(self.deploy_module, "weight"), join(self.deploy_module, "bias")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As the squeezed weight is stored: (out, in / groups, height, width), or (out, in) for a fully connected layer."""
        return self.squeezed.weight_shape[: 2 if self.kind.is_dense else 4]

    @property
    def unread_keys(self) -> tuple[str, ...]:
        """Stored beside the block, without a number of the network."""
        return tuple(join(self.name, part) for part in self.kind.unread)

    @property
    def parts(self) -> tuple[Slot, ...]:
        """Itself and the norms around it, in the order they run."""
        return tuple(part for part in (self.before, self, self.behind) if part is not None)

    def describe(self, read: Read, facts: Facts, keys: Keys) -> Linear:
        """The block over real tensors, without the norms around it; `read` gives them in the wanted dtype."""
        return self.kind.describe(Block(self.name, self.kind, keys, read, facts, self.place))

    def describe_whole(self, read: Read, facts: Facts, keys: Keys, silenced: Tensor | None = None) -> Linear:
        """The block between the norms around it; `silenced`: which of its own outputs (out,) count as zero."""
        described: list[Linear] = [part.describe(read, facts, keys) for part in self.parts]
        if silenced is not None:
            own = self.parts.index(self)
            described[own] = described[own] >> Scale((~silenced).double())
        if self.positions > 1:
            assert isinstance(described[0], Channelwise)
            described[0] = described[0].repeated(self.positions)
        return reduce(Linear.__rshift__, described)


@dataclass(frozen=True, slots=True)
class Plan:
    """A recognised network: its skeleton, what stands at each slot, and which inputs were found legal.

    `norms`: batch norms that stand alone, and why; `facts`: the network's own; `stages`: per stage, its slots' names;
    `usual_shape`: of the images it was published for, where it takes them, else the gates'.
    """

    skeleton: Skeleton
    slots: Mapping[str, Slot]
    norms: Mapping[str, str]
    facts: Mapping[str, Any]
    stages: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    keys: Keys
    channels: int
    gate_shape: Shape
    usual_shape: Shape


@dataclass(frozen=True, slots=True)
class Recognition:
    """`plan` is None where only blocks are known; `slots`: every block that will be fused or was fused already."""

    matches: tuple[Match | NoMatch, ...]
    skeletons: tuple[Match | NoMatch, ...]
    plan: Plan | None
    slots: tuple[Slot, ...]
    family: str
    families: tuple[str, ...]
    architecture: str
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)

    @property
    def already_deployed(self) -> bool:
        return (self.plan is not None or bool(self.slots)) and all(slot.form == "deployed" for slot in self.slots)


def keys_of(tensors: Table) -> Keys:
    return Keys({key: tensor.shape for key, tensor in tensors.items()})


def recognise(
    tensors: Table,
    families: Sequence[Family],
    facts: Facts,
    *,
    family: str | None = None,
    input_shape: Shape | None = None,
    stored_name: str | None = None,
    arch: str | None = None,
    fused_of: Collection[str] = (),
) -> Recognition:
    """Find blocks, then the network around them. `family` and `arch` are what the user said; shapes decide.

    `fused_of`: families whose fused networks these tensors may be, though their names tell nothing.

    Raises NotRecognised when no block is found, InputError for a contradiction, IllegalInput for `input_shape`.
    """
    keys = keys_of(tensors)
    found = {item.name: _matches(item, keys, facts, item.name == family, item.name in (family, *fused_of)) for item in families}
    matched = [item for item in families if isinstance(found[item.name], Match)]
    if family is not None:
        reason = found[family]
        if isinstance(reason, NoMatch):
            others = ", ".join(item.name for item in matched)
            raise NotRecognised(
                f"these are no {family} weights: {reason.reason}",
                hint=f"blocks of {others} are in this file: leave --family out, or name it"
                if others
                else f"its keys look like {_examples(tensors)}",
            )
        matched = [item for item in matched if item.name == family]
    if not matched:
        raise NotRecognised(
            "no block of an installed family is in this file: "
            + "; ".join(f"{item.family}: {item.reason}" for item in found.values() if isinstance(item, NoMatch)),
            hint=f"its keys look like {_examples(tensors)}"
            + ("; `repdeploy families` lists what is known" if _has_norms(tensors) else f"; {CONVERTED_ALREADY}"),
        )
    matched.sort(key=lambda item: _closeness(item, found[item.name], keys))
    kinds = [(item, kind) for item in matched for kind in item.kinds]
    # in a network nothing but its own keys speaks for a block, unless its family was named
    sure = [(item, kind) for item, kind in kinds if kind.found != "when named" or item.name == family]
    plan: Plan | None = None
    tried: list[Match | NoMatch] = []
    for skeleton in dict.fromkeys(skeleton for item in matched for skeleton in item.skeletons):
        outcome = _fit(skeleton, tensors, keys, sure, facts, input_shape)
        if isinstance(outcome, Plan):
            plan = outcome
            tried.append(Match(skeleton.name, sum(slot.form != "kept" for slot in plan.slots.values())))
            break
        tried.append(outcome)
    if plan is not None:
        slots = tuple(slot for slot in plan.slots.values() if slot.form != "kept")
    else:
        slots = tuple(_block_by_block(tensors, keys, kinds, facts, family))
        if input_shape is not None and not _is_single_block(slots):
            raise NotRecognised(
                "the network around these blocks is not known, so an image (of --input-shape or --expect) has no use: "
                + "; ".join(item.reason for item in tried if isinstance(item, NoMatch)),
                hint="leave --input-shape and --expect out: the blocks are fused and proved one by one",
            )
    if not slots and plan is None:
        reasons = "; ".join(item.reason for item in tried if isinstance(item, NoMatch))
        others = ", ".join(item.family for item in found.values() if isinstance(item, Match) and item.family != family)
        raise NotRecognised(
            f"no whole block is in this file: {reasons}",
            hint=f"blocks of {others} are in this file: leave --family out, or name it" if others else "",
        )
    owners = tuple(dict.fromkeys(slot.family for slot in slots))
    name, notes = _architecture(slots, matched, stored_name, arch, plan, facts.record())
    notes += _odd_ones(slots)
    notes += _unproved(kinds, slots, keys) if plan is None else _other_activations(plan, facts)
    left = [item.name for item in families if item not in matched and isinstance(found[item.name], Match)]
    if left and plan is None:
        notes += (f"blocks of {', '.join(left)} are in this file too; leave --family out to fuse all of them",)
    return Recognition(
        matches=tuple(found.values()),
        skeletons=tuple(tried),
        plan=plan,
        slots=slots,
        family=owners[0] if owners else matched[0].name,
        families=owners or (matched[0].name,),
        architecture=name,
        notes=notes,
        dropped=plan.dropped if plan else {},
    )


def _closeness(family: Family, match: Match | NoMatch, keys: Keys) -> tuple[bool, int, bool]:
    """Families with training blocks first. A fused file is most likely of the family that deploys so in an earlier layout,
    and that knows networks."""
    if isinstance(match, Match) and match.blocks:
        return False, 0, not family.skeletons
    fused = (index for index, kind in enumerate(family.kinds) if kind.deploys_as and _standing(_deployed(kind), keys))
    return True, next(fused, len(family.kinds)), not family.skeletons


def _odd_ones(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Blocks that lack a part which most blocks of their kind and shape have: legal, but worth a look."""
    alike: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        shape = slot.squeezed
        if slot.form == "training":
            kept = shape.in_channels == shape.out_channels, shape.stride, shape.groups == shape.in_channels
            alike.setdefault((slot.kind.anchor, shape.kernel_size == (1, 1), *kept), []).append(slot)
    notes = []
    for group in alike.values():
        parts = {slot.name: {key.removeprefix(f"{slot.name}.").rpartition(".")[0] for key in slot.consumed} for slot in group}
        lacking: dict[tuple[str, ...], list[str]] = {}
        for part in sorted(set().union(*parts.values())):
            without = tuple(name for name, has in parts.items() if part not in has)
            if 0 < 2 * len(without) < len(group):
                lacking.setdefault(without, []).append(part)
        for without, missing in lacking.items():
            names, what, others = ", ".join(without[:3]), " and ".join(missing), len(group) - len(without)
            notes.append(f"{names} has no {what}, which {others} blocks like it have; check that the file is complete")
    return tuple(notes)


ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Hardswish", "Mish", "Softplus", "Tanh")
"""torch's modules that a training script may put where a published network has another."""


def _other_activations(plan: Plan, facts: Facts) -> tuple[str, ...]:
    """Activations of a pickled network that its skeleton does not apply: tensors do not tell them, classes do."""
    classes = {str(held.get("class", "")).rpartition(".")[2] for held in facts.attributes.values()}
    others = sorted((classes & set(ACTIVATIONS)) - set(plan.skeleton.activations))
    if not others:
        return ()
    usual = " and ".join(plan.skeleton.activations)
    return (
        f"the pickled network has {', '.join(others)}; {plan.skeleton.name} is described with {usual} only, so anchor it with "
        "--expect, which fails where that matters",
    )


def _unproved(kinds: Sequence[tuple[Family, BlockKind]], slots: Sequence[Slot], keys: Keys) -> tuple[str, ...]:
    """Blocks that only their family's name would prove."""
    known = {slot.name for slot in slots}
    notes = []
    for family, kind in kinds:
        if kind.found == "when named":
            names = [name for name in _standing(kind, keys) if name not in known]
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                notes.append(
                    f"{names[0]}{more} may be of {family.name} too, which such keys do not prove; "
                    f"--family {family.name} takes them for it"
                )
    return tuple(notes)


def arch_settings(name: str | None, stored: str | None, families: Iterable[Family]) -> tuple[str | None, tuple[Setting, ...]]:
    """The official name that `--arch` means, and the facts settled by it or by the name the file calls itself (a hint).

    Raises UsageError for an `--arch` that nobody knows.
    """
    table = {_plain_name(item): (item, known) for family in families for item, known in family.architectures.items()}
    hints: Mapping[str, Any] = next((table[key][1].facts for key in _names_in(stored or "") if key in table), {})
    settled = tuple(Setting("", fact, value, "file") for fact, value in hints.items())
    if name is None:
        return None, settled
    if _plain_name(name) not in table:
        known = ", ".join(item for item, _ in table.values())
        raise UsageError(f"no architecture is called {name!r}", hint=f"known: {known}")
    official, architecture = table[_plain_name(name)]
    return official, (*(Setting("", fact, value, "arch") for fact, value in architecture.facts.items()), *settled)


def _names_in(stored: str) -> tuple[str, ...]:
    """A stored name, whole or without the package or the weights' tag around it: "repghost.repghostnet_0_5x"."""
    return tuple(_plain_name(part) for part in (stored, *stored.split(".")))


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _examples(tensors: Table) -> str:
    return ", ".join(list(tensors)[:3])


def _matches(family: Family, keys: Keys, facts: Facts, named: bool, may_be_fused: bool) -> Match | NoMatch:
    telling = [kind for kind in family.kinds if kind.found == "by key" or (kind.found == "when named" and named)]
    training = sum(len(_standing(kind, keys)) for kind in telling)
    training += sum(len(_pickled_as(kind, keys, facts)) for kind in family.kinds if kind not in telling)
    fused_kinds = family.kinds if may_be_fused else [kind for kind in telling if not kind.ordinary_name]
    deployed = [_deployed(kind) for kind in fused_kinds if kind.deploys_as is not None]
    fused = len({join(name, kind.anchor) for kind in deployed for name in _standing(kind, keys)})
    if training or fused:
        return Match(family.name, training, fused)
    anchors = list(dict.fromkeys(repr(kind.anchor) for kind in telling if not (kind.ordinary_name and kind.one_of_several)))
    if not anchors:
        return NoMatch(family.name, "no key or module of its own is in the file")
    more = " ..." if len(anchors) > MAX_ANCHORS else ""
    return NoMatch(family.name, f"no key ends in {' or '.join(anchors[:MAX_ANCHORS])}{more}")


def _has_norms(tensors: Table) -> bool:
    return any(key.endswith("running_mean") for key in tensors)


def _stands_at(name: str, kind: BlockKind, keys: Keys) -> bool:
    """Whether a block of that kind is stored under that name."""
    return join(name, kind.anchor) in keys.shapes and kind.fits(Block(name, kind, keys, _unread, Facts(), Place()))


def _standing(kind: BlockKind, keys: Keys) -> list[str]:
    return [name for name in _prefixes(keys, kind.anchor) if _stands_at(name, kind, keys)]


def _pickled_as(kind: BlockKind, keys: Keys, facts: Facts) -> list[str]:
    """The modules of a pickled network whose class says that they are such blocks."""
    return [
        name
        for name, held in facts.attributes.items()
        if kind.classes and str(held.get("class", "")).rpartition(".")[2] in kind.classes and _stands_at(name, kind, keys)
    ]


def _unread(key: str, rows: int | None = None) -> Tensor:
    raise AssertionError(f"{key} was read to find out what it is")


def _prefixes(keys: Keys, anchor: str) -> list[str]:
    """The names in front of every key that ends in the anchor."""
    return [key.removesuffix(anchor).removesuffix(".") for key in keys.shapes if key == anchor or key.endswith(f".{anchor}")]


def _outermost(names: Iterable[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [name for name in found if not any(above in found for above in _levels_above(name))]


def _levels_above(name: str) -> Iterable[str]:
    """Every prefix of a dotted name, the root first; none of the root itself."""
    return [name[:end] for end in (0, *(i for i, c in enumerate(name) if c == "."))] if name else []


def _deployed(kind: BlockKind) -> BlockKind:
    """The fused form of a block, as the official deploy model keeps it."""
    where = kind.deploys_as or ""

    def is_dense(block: Block) -> bool:
        return len(block.shape(join(where, "weight"))) == 2

    return BlockKind(
        join(where, "weight"),
        where,
        lambda block: block.conv(where),
        fits=lambda block: join(where, "bias") in block and is_dense(block) == kind.is_dense and kind.fits_fused(block),
        found=kind.found,
        ordinary_name=kind.ordinary_name,
        is_dense=kind.is_dense,
    )


def _slot_at(
    name: str,
    kinds: Sequence[tuple[Family, BlockKind]],
    tensors: Table,
    keys: Keys,
    facts: Facts,
    place: Place,
) -> Slot | None:
    """The block under a name, described on shapes alone; None where nothing known stands there."""
    found = _kind_at(name, kinds, keys)
    return None if found is None else _slot(name, *found, tensors, keys, facts, place)


def _kind_at(name: str, kinds: Sequence[tuple[Family, BlockKind]], keys: Keys) -> tuple[str, BlockKind, Form] | None:
    """Whose block stands under a name, and in which form."""
    choices: list[tuple[str, BlockKind, Form]] = [
        (family.name, kind, "kept" if kind.deploys_as is None else "training") for family, kind in kinds
    ]
    choices += [(family.name, _deployed(kind), "deployed") for family, kind in kinds if kind.deploys_as is not None]
    choices += [("", DENSE, "kept"), ("", PLAIN, "kept")]
    return next((choice for choice in choices if _stands_at(name, choice[1], keys)), None)


def _slot(name: str, owner: str, kind: BlockKind, form: Form, tensors: Table, keys: Keys, facts: Facts, place: Place) -> Slot:
    def ghost(key: str, rows: int | None = None) -> Tensor:
        shape = tensors[key].shape
        return _ghost(shape if rows is None else (rows, *shape[1:]))

    block = Block(name, kind, keys, ghost, facts, place)
    try:
        expression = kind.describe(block)
        squeezed = expression.geometry
        if kind.gives_up is not None:
            kind.gives_up(block)  # facts that only numbers need are known from here on
    except CannotSqueeze as reason:
        raise CannotSqueeze(f"block {name or '(the whole file)'}: {reason}", hint=reason.hint) from reason
    except (ValueError, RuntimeError, TypeError, IndexError) as reason:  # torch's answers to shapes that do not meet
        raise InputError(
            f"the tensors of block {name or '(the whole file)'} contradict each other: {str(reason).splitlines()[0]}",
            hint="the file mixes two networks, or a fact given with --set is wrong",
        ) from reason
    _nothing_left(block, keys)
    return Slot(name, owner, kind, form, place, tuple(block.consumed), repr(expression), squeezed)


def _nothing_left(block: Block, keys: Keys) -> None:
    """Raises InputError where a part of a block holds tensors that its description does not know: it is another block.

    Squeeze-excite and activations beside the branches are not the block's; two blocks may share a prefix.
    """
    if block.kind.found == "in a network" or block.kind.one_of_several:
        return
    consumed = {*block.consumed, *map(block.path, block.kind.unread)}
    parts = {key.removeprefix(f"{block.name}." if block.name else "").split(".")[0] for key in consumed}
    for part in parts:
        for key in keys.below(block.path(part)):
            if key not in consumed and key.rpartition(".")[2] != COUNTER:
                raise InputError(
                    f"{key} has no place in block {block.name or '(the whole file)'}, as far as such blocks are known",
                    hint="another part of the block is missing, or it is a variant that is not known here",
                )


def _ghost(shape: tuple[int, ...]) -> Tensor:
    """A tensor of any shape that takes no memory: one number, repeated."""
    return torch.ones((), dtype=torch.float64).expand(shape)


class _Planner:
    """A net that runs on shapes only and notes what it meets.

    Its images are real tensors of batch 0: every operation of a skeleton knows their shape and computes nothing. (The meta
    device would do, but its first multiplication imports a symbolic algebra system, which takes longer than a conversion.)
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tensors: Table,
        keys: Keys,
        kinds: Sequence[tuple[Family, BlockKind]],
        facts: Facts,
        image_is_stated: bool,
    ) -> None:
        self.skeleton, self.tensors, self.keys, self.kinds, self.facts = skeleton, tensors, keys, kinds, facts
        self.image_is_stated = image_is_stated
        self.slots: dict[str, Slot] = {}
        self.dropped: dict[str, str] = {}
        self.norms: dict[str, str] = {}
        self.answers: dict[str, Any] = {}
        self.stages: dict[str, tuple[str, ...]] = {}
        self.last_map: tuple[int, int] = (0, 0)

    def at(
        self,
        name: str,
        x: Tensor,
        *,
        stride: int = 1,
        padding: int | None = None,
        before: str | None = None,
        behind: str | None = None,
        tile: Pair | None = None,
    ) -> Tensor:
        if name not in self.slots:
            self.slots[name] = self._found(name, Place(x.shape[1], stride, padding, tile=tile), before, behind)
        return self._through(self.slots[name], x)

    def _found(self, name: str, place: Place, before: str | None = None, behind: str | None = None) -> Slot:
        slot = _slot_at(name, self.kinds, self.tensors, self.keys, self.facts, place)
        if slot is None:
            there = [key for key in self.tensors if inside(key, name)][:2]
            raise NotRecognised(f"nothing known stands at {name} ({', '.join(there) or 'no key'})")
        if before is not None:
            norm = self._channelwise(before, slot.squeezed.in_channels, math.prod(place.tile or (1,)))
            slot = replace(slot, before=norm, positions=slot.squeezed.in_channels // norm.squeezed.in_channels)
        # whoever folded the norm behind a plain convolution left its shift in a bias
        is_folded = slot.kind is PLAIN and join(name, "bias") in slot.consumed
        if behind is not None and (behind in self.keys or not is_folded):
            slot = replace(slot, behind=self._channelwise(behind, slot.squeezed.out_channels))
        return slot

    def norm(self, name: str, x: Tensor, *, why: str) -> Tensor:
        if name not in self.slots:
            self.slots[name] = self._channelwise(name, x.shape[1])
            self.norms[name] = why
        return self._through(self.slots[name], x)

    def _channelwise(self, name: str, channels: int, positions: int = 1) -> Slot:
        """The batch norm or the scale of that name, for so many channels, or with one channel for all positions of a tile."""
        kind = next((kind for kind in (NORM, *SCALES) if _stands_at(name, kind, self.keys)), None)
        if kind is None:
            raise InputError(
                f"{name} is missing (a batch norm or a scale), without which this is another network",
                hint="save the whole state dict again; a norm folded into its convolution leaves a bias there",
            )
        slot = _slot(name, "", kind, "kept", self.tensors, self.keys, self.facts, Place(channels))
        if kind in SCALES and slot.squeezed.in_channels != channels:
            raise InputError(f"{name} has {slot.squeezed.in_channels} factors, the layer before it gives {channels} channels")
        if slot.squeezed.in_channels not in (channels, channels / positions):
            raise NotRecognised(f"{name} takes {slot.squeezed.in_channels} channels, the layer before it gives {channels}")
        return slot

    def _through(self, slot: Slot, x: Tensor) -> Tensor:
        if slot.squeezed.in_channels != x.shape[1]:
            raise NotRecognised(
                f"{slot.name} takes {slot.squeezed.in_channels} channels, the layer before it gives {x.shape[1]}"
            )
        return x.new_empty(0, slot.squeezed.out_channels, *slot.squeezed.output_size(*x.shape[2:]))

    def fact(
        self,
        name: str,
        convention: Any,
        *,
        fits: Callable[[Any], bool] = lambda value: True,
        image_says: str = "",
        question: str = "",
    ) -> Any:
        if name not in self.answers:
            if name not in {kind.name for kind in self.skeleton.facts}:
                raise LookupError(f"the skeleton {self.skeleton.name} asks for {name!r}, which it does not declare")
            self.facts = self.facts.without_hints(name, fits)
            nothing_tells = convention is None or (image_says and not self.image_is_stated)
            if nothing_tells and self.facts.stated("", name) is None:
                given = f"; the image leaves open: {image_says}" if image_says and self.image_is_stated else ""
                other = "" if self.image_is_stated else ", or convert with --input-shape: the size of its images may tell"
                raise InputError(f"{question}{given}", hint=f"state it with --set {name}=...{other}")
            origin: Origin = "image" if image_says else "skeleton"
            self.answers[name] = self.facts.resolve("", name, convention=convention, origin=origin)
        return self.answers[name]

    def linear(self, name: str, x: Tensor, *, before: str | None = None) -> Tensor:
        if name not in self.slots:
            slot = self._found(name, Place(x.shape[1]), before)
            if not slot.kind.is_dense:
                raise NotRecognised(f"{name} is no fully connected layer")
            self.slots[name] = replace(slot, on_vector=True)
        shape = self.slots[name].squeezed
        if x.shape[1] != shape.in_channels:
            raise IllegalInput(
                f"the image does not fit: {name} takes {shape.in_channels} numbers, the layer before it gives {x.shape[1]}",
                hint="such a network takes one range of sizes; convert without --input-shape finds the smallest",
            )
        return x.new_empty(0, shape.out_channels)

    def __contains__(self, name: str) -> bool:
        return name in self.keys

    def children(self, name: str, prefix: str = "") -> tuple[str, ...]:
        found = self.keys.children(name, prefix)
        first = found[0].removeprefix(join(name, prefix)).removeprefix(".") if found else "0"
        start = 1 if first == "1" and prefix else 0
        if found != tuple(join(name, f"{prefix}{index}") for index in range(start, start + len(found))):
            raise NotRecognised(f"a number is missing among {', '.join(found[:3])} ... {found[-1]}")
        self.stages[name] = found
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.keys.shapes:
            raise NotRecognised(f"{name} is not there")
        return self.keys.shapes[name]

    def drop(self, name: str, reason: str) -> None:
        if name in self.keys:
            self.dropped[name] = reason

    def pooled(self, x: Tensor) -> Tensor:
        self.last_map = (x.shape[2], x.shape[3])
        return x

    def trial(self, shape: Shape) -> Tensor:
        """Run on one image of that shape. Raises IllegalInput where the network cannot take it."""
        self.last_map = (0, 0)
        try:
            result = self.skeleton.forward(self, torch.empty(0, *shape))
        except RuntimeError as reason:  # a pooling window that does not fit the map it gets
            raise IllegalInput(
                f"an image of {'x'.join(map(str, shape))} is too small: {reason}".splitlines()[0],
                hint="use a larger image; convert without --input-shape finds the smallest",
            ) from reason
        return result

    def left_over(self) -> list[str]:
        used = {key for slot in self.slots.values() for part in slot.parts for key in part.consumed}
        used |= {key for slot in self.slots.values() for key in slot.unread_keys}
        return [
            key
            for key in self.tensors
            if key not in used and key.rpartition(".")[2] != COUNTER and not any(inside(key, name) for name in self.dropped)
        ]


def _fit(
    skeleton: Skeleton,
    tensors: Table,
    keys: Keys,
    kinds: Sequence[tuple[Family, BlockKind]],
    facts: Facts,
    input_shape: Shape | None,
) -> Plan | NoMatch:
    planner = _Planner(skeleton, tensors, keys, kinds, facts.unrecorded(), input_shape is not None)
    try:
        channels = _input_channels(skeleton, planner)
        if input_shape is None:
            shape = _smallest_shape(planner, channels)
        elif input_shape[0] != channels:
            raise IllegalInput(
                f"the network takes {channels} channels, the image has {input_shape[0]} (of channels, height, width)",
                hint=f"for example --input-shape 1x{channels}x{skeleton.side}x{skeleton.side}",
            )
        else:
            planner.trial(input_shape)
            shape = input_shape
    except NotRecognised as reason:
        return NoMatch(skeleton.name, str(reason))
    left = planner.left_over()
    if left:
        return NoMatch(skeleton.name, f"{len(left)} tensors have no place in it: {', '.join(left[:3])}")
    facts.absorb(planner.facts)
    return Plan(
        skeleton=skeleton,
        slots=planner.slots,
        norms=planner.norms,
        facts=planner.answers,
        stages=planner.stages,
        dropped=planner.dropped,
        keys=planner.keys,
        channels=channels,
        gate_shape=shape,
        usual_shape=_usual_shape(planner, channels, shape),
    )


def _usual_shape(planner: _Planner, channels: int, gate_shape: Shape) -> Shape:
    side = planner.skeleton.side
    try:
        planner.trial((channels, side, side))
    except IllegalInput as reason:
        return (channels, *reason.fits) if reason.fits else gate_shape
    return channels, side, side


def _input_channels(skeleton: Skeleton, planner: _Planner) -> int:
    """The stem has one group, so its kernel's second dimension is the image's channels."""
    for name in skeleton.stems:
        if name in planner:
            found = _kind_at(name, planner.kinds, planner.keys)
            if found is not None:
                block = Block(name, found[1], planner.keys, _unread, Facts(), Place())
                return found[1].inputs(block) or block.kernel_shape(found[1].largest_kernel)[1]
    raise NotRecognised(f"no stem: nothing known stands at {' or '.join(skeleton.stems)}")


def _smallest_shape(planner: _Planner, channels: int) -> Shape:
    """The smallest odd, preferably not square image whose last map is at least 3x3, else the smallest legal one."""

    def legal(side: int, interior: bool) -> Shape | None:
        for height in (side + 2, side):
            try:
                planner.trial((channels, height, side))
            except IllegalInput as reason:
                reasons.append(reason)
                continue
            if not interior or min(planner.last_map) >= LAST_MAP:
                return channels, height, side
        return None

    reasons: list[IllegalInput] = []
    for interior in (True, False):
        for before, side in zip((3, *SIDES), SIDES, strict=False):
            if legal(side, interior):
                nearer = (legal(near, interior) for near in range(before + 2, side + 2, 2))
                return next(shape for shape in nearer if shape)
        for side in range(25, 65):  # networks for one small data set, whose fully connected layers fix the map
            if shape := legal(side, interior):
                return shape
    fits = reasons[-1].fits
    if fits is not None:
        for height, width in ((fits[0] | 1, fits[1] | 1), fits):
            with contextlib.suppress(IllegalInput):
                planner.trial((channels, height, width))
                return channels, height, width
    raise NotRecognised(str(reasons[-1]))


def _block_by_block(
    tensors: Table, keys: Keys, kinds: Sequence[tuple[Family, BlockKind]], facts: Facts, family: str | None
) -> Iterable[Slot]:
    unknown = Place(origin="default")
    found: dict[str, list[tuple[str, BlockKind, Form]]] = {}

    def note(names: Iterable[str], owner: str, kind: BlockKind, form: Form) -> None:
        for name in names:
            found.setdefault(name, []).append((owner, kind, form))

    for owner, kind in kinds:
        telling = kind.found == "by key" or (kind.found == "when named" and owner.name == family)
        names = _standing(kind, keys) if telling else _pickled_as(kind, keys, facts)
        note(names, owner.name, kind, "training")
    for owner, kind in kinds:
        if kind.found != "in a network" and kind.deploys_as and not kind.ordinary_name:
            fused = _deployed(kind)
            note(_standing(fused, keys), owner.name, fused, "deployed")
    for name in _outermost(found):
        several = [choice for choice in found[name] if choice[1].one_of_several]
        for owner_name, kind, form in several or found[name][:1]:
            yield _slot(name, owner_name, kind, form, tensors, keys, facts, unknown)


def _is_single_block(slots: Sequence[Slot]) -> bool:
    return len(slots) == 1 and slots[0].name == ""


def _architecture(
    slots: Sequence[Slot],
    families: Sequence[Family],
    stored: str | None,
    arch: str | None,
    plan: Plan | None,
    facts: Sequence[Fact],
) -> tuple[str, tuple[str, ...]]:
    """The official name whose depths and widths these are, else the depths and widths; shapes beat a stored name."""
    if plan is None:
        if arch is not None:
            raise InputError(f"--arch {arch} names a network, but only single blocks were recognised in this file")
        return f"{len(slots)} block{'s' if len(slots) != 1 else ''} of an unknown network", ()
    seen = _measured(plan)
    own = f"blocks {_listed(seen.depths)}, widths {_listed(seen.widths)}" + (
        f", groups {seen.groups}" if seen.groups > 1 else ""
    )
    table = {name: item for family in families for name, item in family.architectures.items()}
    if arch is not None and arch not in table:
        raise InputError(
            f"--arch {arch} is an architecture of another family than {', '.join(item.name for item in families)}",
            hint="leave --arch out: the architecture is read from the shapes",
        )
    if arch is not None and not _is(table[arch], seen):
        wanted = table[arch]
        raise InputError(
            f"this is not {arch}: it is {seen.skeleton} with {own}; {arch} is {wanted.skeleton or 'a network'} with blocks "
            f"{_listed(wanted.depths)}, widths {_listed(wanted.widths)}"
            + (f", groups {wanted.groups}" if wanted.groups > 1 else ""),
            hint="leave --arch out: the architecture is read from the shapes",
        )
    used = {(fact.name, fact.value) for fact in facts}
    fitting = [
        name
        for name, item in table.items()
        if _is(item, seen) and all((fact, str(value)) in used for fact, value in item.facts.items())
    ]
    called = _names_in(stored or "")
    own_name = next((item for item in fitting if _plain_name(item) in called), None)
    different = list({id(table[item]): item for item in reversed(fitting)}.values())[::-1]  # a variant may have two names
    name = arch or own_name or " or ".join(different) or None
    notes: tuple[str, ...] = ()
    if stored is not None and _plain_name(name or "") not in called and stored not in {item.name for item in families}:
        notes = (f"the file calls itself {stored}; its shapes are {name or own}, and shapes win",)
    return name or f"{plan.skeleton.name} ({own})", notes


def _is(official: Architecture, seen: Architecture) -> bool:
    """Whether a network has an official variant's shapes, and its skeleton where that matters."""
    return replace(official, facts={}, skeleton=official.skeleton or seen.skeleton) == seen


def _measured(plan: Plan) -> Architecture:
    """Depths and widths of a network, stage by stage, in the order its blocks are met."""
    stages: dict[str, int] = {}
    groups = 1
    numbered = {name for name, children in plan.stages.items() if not _holds_stages(children, plan)}
    for name, slot in plan.slots.items():
        if not slot.family or slot.on_vector:
            continue
        stage = max((item for item in numbered if inside(name, item)), key=len, default=name)
        stages[stage] = slot.squeezed.out_channels
        if slot.squeezed.groups < slot.squeezed.in_channels:
            groups = max(groups, slot.squeezed.groups)
    depths = tuple(len(plan.stages.get(stage) or (stage,)) for stage in stages)
    return Architecture(depths, tuple(stages.values()), groups, skeleton=plan.skeleton.name)


def _holds_stages(children: Iterable[str], plan: Plan) -> bool:
    """Whether these numbered names are stages themselves, or hold some."""
    filled = [name for name, inner in plan.stages.items() if inner]
    return any(name == child or inside(name, child) for child in children for name in filled)


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))

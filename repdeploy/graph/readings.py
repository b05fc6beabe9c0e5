"""Every value as a linear map of the values before it: from each possible source the expression between, by shapes alone.

A reading grows node by node, in the order of the graph. Weights are looked at only when a region is squeezed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from repdeploy.algebra import Conv, Geometry, Identity, Linear, Norm, Pad, Shift
from repdeploy.algebra.geometry import align
from repdeploy.errors import CannotSqueeze
from repdeploy.graph.attributes import ints
from repdeploy.graph.borders import Borders
from repdeploy.graph.forms import TRANSPOSED, Form, Forms, Layout, Sum, Through, Unary, channels_of, layouts_of
from repdeploy.graph.known import Known

LEAVES = 1000
"""Of an expression: a graph that forks and joins again and again has exponentially many paths."""
SOURCES = 96
"""Sources remembered per value, nearest first: longer chains are squeezed piece by piece."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a region begins: a value, behind nodes that a pointwise map passes (pooling, flattening, transposing)."""

    base: ir.Value
    layout: Layout
    through: tuple[Through, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """value = expression(source). `nodes`: what lies between; `bound`: it holds at this image size only."""

    source: Source
    expression: Linear
    geometry: Geometry
    nodes: frozenset[ir.Node]
    shifts: bool
    bound: bool = False
    leaves: int = 1

    @property
    def is_pointwise(self) -> bool:
        one = (1, 1)
        return (self.geometry.kernel_size, self.geometry.stride, self.geometry.pads) == (one, one, (0, 0, 0, 0))


@dataclass(slots=True)
class Readings:
    """The readings of one graph's values, nearest source first, and per node why some were refused."""

    known: Known
    forms: Forms
    of: dict[ir.Value, dict[Source, Reading]] = field(default_factory=dict)
    refused: dict[ir.Node, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, graph: ir.Graph, known: Known) -> Readings:
        found, borders = cls(known, Forms(known)), Borders(known)
        for node in graph:
            patched = borders.read(node)
            forms: tuple[Form, ...] = (patched,) if patched is not None else found.forms.read(node)
            table: dict[Source, Reading] = {}
            try:
                table.update(itertools.islice(found._of_node(node, forms), SOURCES))
            except CannotSqueeze as reason:
                found._refuse(node, str(reason))
            if table:
                found.of[node.outputs[0]] = table
        return found

    def _of_node(self, node: ir.Node, forms: tuple[Form, ...]) -> Iterator[tuple[Source, Reading]]:
        for form in forms:
            if isinstance(form, Unary):
                yield from self._behind(node, form)
            elif isinstance(form, Sum):
                yield from self._summed(node, form)
            else:
                yield from self._passed(node, form)

    def _behind(self, node: ir.Node, form: Unary) -> Iterator[tuple[Source, Reading]]:
        leaf, source = form.leaf, Source(form.input, form.layout)
        own = Reading(source, leaf, leaf.geometry, frozenset(form.nodes), _shifts(leaf), form.bound)
        yield source, own
        for farther, before in self.of.get(form.input, {}).items():
            if farther.layout == form.layout:
                yield from self._composed(node, before, own)

    def _composed(self, node: ir.Node, before: Reading, after: Reading) -> Iterator[tuple[Source, Reading]]:
        """`after` read from where `before` begins."""
        try:
            geometry = before.geometry.then(after.geometry)
        except CannotSqueeze as reason:
            self._refuse(node, str(reason))
            return
        if before.leaves + after.leaves > LEAVES:
            self._refuse(node, "its region would be too large: it is squeezed piece by piece")
            return
        expression, nodes = before.expression >> after.expression, before.nodes | after.nodes
        shifts, bound = before.shifts or after.shifts, before.bound or after.bound
        yield before.source, Reading(before.source, expression, geometry, nodes, shifts, bound, before.leaves + after.leaves)

    def _summed(self, node: ir.Node, form: Sum) -> Iterator[tuple[Source, Reading]]:
        values = dict.fromkeys(value for value, _ in form.terms)
        tables = {value: self.of.get(value, {}) for value in values}
        first = form.terms[0][0]
        # a value is a source of itself: `x + f(x)`
        layouts = {source.layout for table in tables.values() for source in table} or layouts_of(self.known, first)
        own = [Source(value, layout) for value in values for layout in sorted(layouts)]
        shared = [source for source in (*own, *tables[first]) if all(
            source in tables[value] or (source.base is value and not source.through) for value in values)]  # fmt: skip
        behind: set[Source] = set()  # reached through a nearer source, so that a chain of sums stays a chain
        for source in dict.fromkeys(shared):
            if source in behind:
                continue
            try:
                found = [_signed(tables[value].get(source) or self._itself(source), sign) for value, sign in form.terms]
                if sum(part.leaves for part in found) > LEAVES:
                    raise CannotSqueeze("its region would be too large: it is squeezed piece by piece")
                geometry = align([part.geometry for part in found])
                expression = found[0].expression
                for part in found[1:]:
                    expression = expression + part.expression
            except CannotSqueeze as reason:
                self._refuse(node, str(reason))
                continue
            except ValueError:  # channels are broadcast
                self._refuse(node, "its inputs have different numbers of channels")
                continue
            reading = Reading(
                source,
                expression,
                geometry.geometry,
                frozenset({node}).union(*(part.nodes for part in found)),
                any(part.shifts for part in found),
                any(part.bound for part in found),
                sum(part.leaves for part in found),
            )
            yield source, reading
            for farther, before in () if source.through else self.of.get(source.base, {}).items():
                if farther.layout == source.layout and farther not in behind:
                    behind.add(farther)
                    yield from self._composed(node, before, reading)
        if not shared:
            self._refuse(node, self._apart(form))

    def _itself(self, source: Source) -> Reading:
        return _identity(source, channels_of(self.known, source.base, source.layout))

    def _apart(self, form: Sum) -> str:
        """Why branches have no linear source in common: what they end at."""
        ends = []
        for value, _ in form.terms:
            farthest = max(self.of.get(value, {}).values(), key=lambda reading: len(reading.nodes), default=None)
            base = farthest.source.base if farthest is not None else value
            producer = base.producer()
            ends.append(
                f"{producer.op_type} {producer.name or ''}".strip() if producer is not None else f"the input {base.name}"
            )
        return f"its branches are linear maps of different values: {' and '.join(dict.fromkeys(ends))} stand between"

    def _passed(self, node: ir.Node, form: Through) -> Iterator[tuple[Source, Reading]]:
        turned = TRANSPOSED[ints(node, "perm")] if form.kind == "transpose" else ()
        for layout in turned:
            source = Source(form.input, _other(layout), (form,))
            yield source, replace(_identity(source, channels_of(self.known, form.input, layout)), nodes=frozenset({node}))
        for source, before in self.of.get(form.input, {}).items():
            if not before.is_pointwise:
                continue
            if form.kind != "transpose":
                if source.layout == "first":
                    after = replace(source, through=(*source.through, form))
                    yield after, replace(before, source=after, nodes=before.nodes | {node})
            elif source.layout in turned:
                after = _transposed(source, form)
                yield after, replace(before, source=after, nodes=before.nodes | {node})

    def _refuse(self, node: ir.Node, reason: str) -> None:
        if reason and reason not in self.refused.setdefault(node, []):
            self.refused[node].append(reason)


def _identity(source: Source, channels: int) -> Reading:
    leaf = Identity(torch.zeros(channels, dtype=torch.float64))
    return Reading(source, leaf, leaf.geometry, frozenset(), shifts=False)


def _signed(reading: Reading, sign: int) -> Reading:
    return reading if sign > 0 else replace(reading, expression=-reading.expression)


def _other(layout: Layout) -> Layout:
    return "last" if layout == "first" else "first"


def _transposed(source: Source, form: Through) -> Source:
    """Behind one more transposition; there and back again is nothing."""
    layout = _other(source.layout)
    last = source.through[-1] if source.through else None
    if last is not None and last.kind == "transpose":
        there, back = ints(last.node, "perm"), ints(form.node, "perm")
        if tuple(there[axis] for axis in back) == tuple(range(len(back))):
            return Source(source.base, layout, source.through[:-1])
    return Source(source.base, layout, (*source.through, form))


def _shifts(leaf: Linear) -> bool:
    """Whether a leaf adds anything of its own, so that the squeezed convolution has a bias."""
    if isinstance(leaf, Conv):
        return leaf.bias is not None
    return isinstance(leaf, Norm | Shift) or (isinstance(leaf, Pad) and bool(leaf.value.any())) or any(
        _shifts(part) for part in leaf.children()
    )  # fmt: skip

"""Write a float32 graph in half precision: what each operator may compute in is read from ONNX's own schemas.

No operator is listed here by what it supports. A value is narrow where the node that makes it is; a node stays wide because it
was asked for, because the guard found it, or because the schema has no such type; casts stand where the two meet.
Source: ONNX operator schemas (onnx.defs); onnxruntime's float16 converter for the operators that are better kept wide.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from repdeploy.errors import InputError, UsageError
from repdeploy.exporters.judging import REDUCED_TYPES
from repdeploy.graph.typed import with_types
from repdeploy.records import WideLayer

WIDE = ir.DataType.FLOAT
PRECISIONS = {name: kind for kind, name in REDUCED_TYPES.items()}
ARRAYS: Mapping[ir.DataType, np.dtype] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
KEPT_BY_DEFAULT = (
    "Softmax", "LogSoftmax", "ReduceMean", "GlobalAveragePool", "LayerNormalization", "GroupNormalization",
    "InstanceNormalization",
)  # fmt: skip
"""Operators that sum over many values, or take exponentials: narrow, they lose what the rest of the graph keeps."""
MADE_FROM = "repdeploy.made_from"
"""Under which a stored tensor notes, until the graph is swept, whose place it takes."""
STATED_TYPE = "dtype"
"""The attribute of operators that say themselves which type they make."""
NO_DEFAULT = "none"
"""As a pattern: keep nothing but what is asked for."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What stays wide: `patterns` are operators, names of layers or regular expressions; `found`: layers by name, and why."""

    patterns: tuple[str, ...] = ()
    found: Mapping[str, str] = field(default_factory=dict)

    def reasons(self, nodes: Sequence[ir.Node]) -> dict[ir.Node, str]:
        """The nodes that stay wide, and why. Raises UsageError for a pattern that nothing answers to."""
        asked = [pattern for pattern in self.patterns if pattern != NO_DEFAULT]
        kept: dict[ir.Node, str] = {}
        if NO_DEFAULT not in self.patterns:
            kept |= {node: f"{node.op_type} is kept in float32" for node in nodes if node.op_type in KEPT_BY_DEFAULT}
        for pattern in asked:
            hits = [node for node in nodes if pattern in (node.op_type, node.name)] or _matching(nodes, pattern)
            if not hits:
                names = [name for node in nodes for name in (node.name or "", node.op_type) if name]
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                raise UsageError(
                    f"--keep-fp32 {pattern}: no layer and no operator of this graph is called so",
                    hint=f"near: {', '.join(dict.fromkeys(near))}"
                    if near
                    else "give an operator, a layer, or a regular expression",
                )
            kept |= dict.fromkeys(hits, f"--keep-fp32 {pattern}")
        kept |= {node: self.found[name] for node in nodes if (name := node.name or "") in self.found}
        return kept


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A graph after casting, and the layers that stay in float32."""

    model: ir.Model
    wide: tuple[WideLayer, ...]


def prepared(model: ir.Model) -> ir.Model:
    """A wide graph as the caster and the guard want it: constants stored, every value typed, every node named.

    Raises InputError for graphs within the graph.
    """
    model = model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for index, node in enumerate(model.graph):
        if any(item.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for item in node.attributes.values()):
            raise InputError(
                f"{node.op_type} {node.name or ''} holds a graph of its own, which is not cast to another precision here",
                hint="export with --precision fp32, or export the network without control flow",
            )
        node.name = node.name or f"{node.op_type}_{index}"
    return with_types(model)


def narrowed(model: ir.Model, to: ir.DataType, keep: Keep, *, narrow_ends: bool) -> Narrowed:
    """Cast a graph that `prepared` gave. `narrow_ends`: its inputs and outputs too. Raises UsageError as `Keep.reasons`."""
    model = model.clone()
    graph = model.graph
    nodes = tuple(graph)
    kept = keep.reasons(nodes)
    casts = _Casts(graph, to)
    if narrow_ends:
        for value in graph.inputs:
            if value.dtype == WIDE:
                value.type = ir.TensorType(to)  # a clone shares its types with the original
    wide = []
    for node in nodes:
        schema = _schema(node, model.opset_imports)
        allowed = _allows(schema, node, to) if node not in kept else None
        if allowed is None or not (allowed.inputs or allowed.outputs):
            _widen(node, to)
            if _computes(node):
                wide.append(WideLayer(node.name or "", node.op_type, kept.get(node) or _why_wide(node, to, model)))
            allowed = NOWHERE
        for index, read in enumerate(node.inputs):
            if read is not None and read.dtype in (WIDE, to):
                casts.read(node, index, to if index in allowed.inputs else WIDE)
        if node.op_type == "Cast" and allowed.outputs:
            node.attributes["to"] = ir.AttrInt64("to", int(to))
        for index in allowed.outputs:
            if node.outputs[index].dtype == WIDE:
                node.outputs[index].type = ir.TensorType(to)
    casts.close_outputs(to if narrow_ends else WIDE)
    return Narrowed(model, tuple(wide))


def _matching(nodes: Sequence[ir.Node], pattern: str) -> list[ir.Node]:
    try:
        return [node for node in nodes if re.fullmatch(pattern, node.name or "")]
    except re.error as reason:
        raise UsageError(
            f"--keep-fp32 {pattern} names no layer or operator, and is no regular expression: {reason}",
            hint="escape what is meant literally",
        ) from reason


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Positions at which a node takes and gives the narrow type."""

    inputs: frozenset[int]
    outputs: frozenset[int]


NOWHERE = _Allowed(frozenset(), frozenset())


def _schema(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:  # an operator of somebody else
        return None


def _allows(schema: onnx.defs.OpSchema | None, node: ir.Node, to: ir.DataType) -> _Allowed | None:
    """None where the schema is unknown, or the type is stated otherwise than by what is read."""
    if schema is None or STATED_TYPE in node.attributes or not _is_plain(node):
        return None
    name = f"tensor({to.name.lower()})"
    sides = []
    for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        floats = [index for index, value in enumerate(values) if value is not None and value.dtype in (WIDE, to)]
        sides.append(frozenset(i for i in floats if formals and name in formals[min(i, len(formals) - 1)].types))
    inputs, outputs = sides
    return _Allowed(inputs, outputs) if inputs or node.op_type == "Cast" else None


def _why_wide(node: ir.Node, to: ir.DataType, model: ir.Model) -> str:
    if not _is_plain(node):
        return f"{node.op_type} works on values that are no tensors"
    if STATED_TYPE in node.attributes or not any(_is_float(value, to) for value in node.inputs):
        return f"{node.op_type} states its type itself"
    return f"ONNX has no {to.name.lower()} {node.op_type} in opset {model.opset_imports.get(node.domain, 0)}"


def _widen(node: ir.Node, narrow: ir.DataType) -> None:
    """Another exporter's narrow layer, kept wide: what it is given will be wide, so is what it makes."""
    if node.op_type != "Cast" and _is_plain(node) and any(_is_float(value, narrow) for value in node.inputs):
        for value in node.outputs:
            if value.dtype == narrow:
                value.type = ir.TensorType(WIDE)


def _is_float(value: ir.Value | None, narrow: ir.DataType) -> bool:
    return value is not None and value.dtype in (WIDE, narrow)


def _is_plain(node: ir.Node) -> bool:
    """Whether all it reads and makes are tensors."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.type is not None]
    return all(isinstance(value.type, ir.TensorType) for value in values)


def _computes(node: ir.Node) -> bool:
    """Whether a node makes floating point numbers: shapes and indices are nobody's loss."""
    return any(value.dtype == WIDE for value in node.outputs)


class _Casts:
    """Values in the type that a reader wants: stored ones are rounded, computed ones cast once."""

    def __init__(self, graph: ir.Graph, narrow: ir.DataType) -> None:
        self._graph, self._narrow = graph, narrow
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._names = _all_names(graph)

    def read(self, node: ir.Node, index: int, dtype: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype != dtype:
            node.replace_input_with(index, self._as(value, dtype))

    def close_outputs(self, dtype: ir.DataType) -> None:
        """Give the graph's outputs, under their own names, the type that is promised outside."""
        for index, value in enumerate(self._graph.outputs):
            if value.dtype not in (WIDE, self._narrow) or value.dtype == dtype:
                continue
            name, inner = value.name or "", self._fresh(value, value.dtype)
            outer = self._as(value, dtype)
            if value.const_value is not None:  # a clone shares its tensors with the original, which keep their names
                value.const_value = ir.tensor(value.const_value.numpy(), value.dtype, name=inner)
            value.name, outer.name = inner, name
            self._graph.outputs[index] = outer

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self._made:
            self._made[value, dtype] = self._stored(value, dtype) if value.const_value is not None else self._cast(value, dtype)
        return self._made[value, dtype]

    def _stored(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        with np.errstate(over="ignore"):  # the guard has told what overflows
            array = value.const_value.numpy().astype(ARRAYS[dtype])
        name = self._fresh(value, dtype)
        stored = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=ir.tensor(array, dtype, name=name)
        )
        stored.metadata_props[MADE_FROM] = value.name or ""
        self._graph.register_initializer(stored)
        return stored

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = self._fresh(value, dtype)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"cast.{name}", num_outputs=1)
        result = cast.outputs[0]
        result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            first = next(iter(self._graph), None)
            assert first is not None
            self._graph.insert_before(first, cast)
        else:
            self._graph.insert_after(producer, cast)
        return result

    def _fresh(self, value: ir.Value, dtype: ir.DataType | None) -> str:
        assert dtype is not None
        base = f"{value.name}.{'fp32' if dtype == WIDE else next(k for k, v in PRECISIONS.items() if v == dtype)}"
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}.{count}"
        self._names.add(name)
        return name


def swept(model: ir.Model) -> ir.Model:
    """The same graph without the stored tensors that nothing reads any more; what took their place gets their names."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]
    taken = _all_names(graph)
    for value in list(graph.initializers.values()):
        original = value.metadata_props.pop(MADE_FROM, None)
        if original is not None and original not in taken and value.const_value is not None:
            value.name = value.const_value.name = original
            taken.add(original)
    return model


def _all_names(graph: ir.Graph) -> set[str]:
    values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    return {value.name or "" for value in values}

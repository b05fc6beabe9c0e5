"""What TensorRT really ran: the times that it reports per layer, joined with what the engine's inspector tells of each.

How much that is depends on the engine: one built with detailed profiling tells kernels, strides and tactics, others names only.
Sources: TensorRT's Python API (IProfiler, EngineInspector); its documentation, "Engine Inspector", and the migration guide for
the inspector's JSON of both majors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from repdeploy.measurements import LayerKind, RanLayer
from repdeploy.runtimes.ran_layers import FLOAT32, Shape, convolution, matrix_product, typical

TYPE_WORDS = (
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("fp16", re.compile(r"fp16|\bhalf\b|float16", re.I)),
    ("fp32", re.compile(r"fp32|\bfloat\b|float32", re.I)),
    ("fp8", re.compile(r"fp8", re.I)),
    ("int8", re.compile(r"int8", re.I)),
    ("int4", re.compile(r"int4", re.I)),
)
"""How the inspector writes types: 10 in one string with the layout, 11 in a field of its own."""
TYPE_FIELDS = ("DataType", "Datatype", "Format/DataType", "Format/Datatype", "Format")
ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
KIND_WORDS: tuple[tuple[LayerKind, re.Pattern[str]], ...] = (
    ("reorder", re.compile(r"reformat", re.I)),
    ("other", re.compile(r"deconv", re.I)),
    ("convolution", re.compile(r"conv", re.I)),
    ("matmul", re.compile(r"gemm|matrixmultiply", re.I)),
)
"""What a layer's type says of its kind, the first that fits."""


def listener(trt: Any) -> Any:
    """A profiler that keeps the seconds of every layer, run by run."""

    class Listener(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.runs: list[list[tuple[str, float]]] = []

        def begin(self) -> None:
            self.runs.append([])

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.runs[-1].append((layer_name, ms / 1000))

    return Listener()


def joined(runs: Sequence[Sequence[tuple[str, float]]], inspected: Sequence[Any]) -> tuple[RanLayer, ...]:
    """The reported layers with their median seconds, and what the inspector tells of those it knows by the same name."""
    told = {item["Name"]: item for item in inspected if isinstance(item, dict) and "Name" in item}
    return typical([[_layer(name, seconds, told.get(name, {})) for name, seconds in run] for run in runs], "TensorRT")


def type_of(tensor: Mapping[str, Any]) -> str:
    """Of a tensor as the inspector describes it; empty where it does not tell."""
    said = next((str(tensor[field]) for field in TYPE_FIELDS if field in tensor), "")
    return next((name for name, words in TYPE_WORDS if words.search(said)), "")


def _layer(name: str, seconds: float, told: Mapping[str, Any]) -> RanLayer:
    implementation = str(told.get("TacticName") or told.get("LayerType", ""))
    inputs, outputs = ([_shape(tensor) for tensor in told.get(side, ())] for side in ("Inputs", "Outputs"))
    kind = _kind(f"{told.get('ParameterType', '')} {told.get('LayerType', '')}") if told else _kind_by_name(name)
    if not inputs or not outputs or min(*inputs[0], *outputs[0], 1) < 1:  # an open size reads -1
        return RanLayer(name, kind, implementation, seconds)
    itemsize = ITEMSIZES.get(type_of(told["Inputs"][0]), FLOAT32)
    if kind == "convolution" and "Kernel" in told:
        groups = told.get("Groups", 1)
        weights = (outputs[0][1], inputs[0][1] // groups, *told["Kernel"])
        return convolution(
            name, implementation, seconds, input_shape=inputs[0], weight_shape=weights, output_shape=outputs[0],
            stride=tuple(told.get("Stride", ())), biased=bool(told.get("HasBias", told.get("Bias", {}).get("Count", 0))),
            itemsize=itemsize, added=sum(math.prod(shape) for shape in inputs[1:] if shape == outputs[0]),
        )  # fmt: skip
    if kind == "matmul" and min(len(inputs[0]), len(outputs[0])) > 1:
        return matrix_product(
            name, implementation, seconds, first=inputs[0], second=(inputs[0][-1], outputs[0][-1]), output_shape=outputs[0],
            biased=False, itemsize=itemsize,
        )  # fmt: skip
    moved = itemsize * sum(math.prod(shape) for shape in (*inputs, *outputs))
    return RanLayer(name, kind, implementation, seconds, input_shape=inputs[0], output_shape=outputs[0], bytes=moved)


def _kind(said: str) -> LayerKind:
    return next((kind for kind, words in KIND_WORDS if words.search(said)), "other")


def _kind_by_name(name: str) -> LayerKind:
    """Layers that TensorRT adds by itself are named for what they do, the others after the graph's nodes."""
    return "reorder" if name.startswith("Reformatting") else "other"


def _shape(tensor: Mapping[str, Any]) -> Shape:
    return tuple(tensor.get("Dimensions", ()))

"""What onnxruntime really ran: its own profile, joined with the graph that its optimiser made.

The profile names nodes, seconds and shapes; kernels and strides stand in the optimised graph. In MLAS's blocked layout (NCHWc)
channels are padded, there as in the profile, so those of a blocked convolution are read from the graph before blocking.
Sources: onnxruntime's documentation, "Profiling tools" and "Graph optimizations"; files of onnxruntime 1.31.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from repdeploy.errors import BackendFailed
from repdeploy.measurements import LayerKind, RanLayer
from repdeploy.runtimes.interface import Feeds
from repdeploy.runtimes.ran_layers import FLOAT32, Shape, convolution, matrix_product, typical

if TYPE_CHECKING:
    import onnx

WARM_UP_RUNS = 2
BLOCKED_DOMAIN = "com.microsoft.nchwc"
BLOCKED = re.compile(r"(.+)_nchwc(?:_token_\d+)?")
NORM = "_bn"
"""What onnxruntime calls a convolution that it blocked: after the value that it made before, and a number where taken. A batch
norm that no convolution took in becomes a depthwise convolution of 1x1, and says so."""
NODE_END, RUN_END = "_kernel_time", "model_run"
CONVOLUTIONS = frozenset({"Conv", "FusedConv"})
PRODUCTS = frozenset({"Gemm", "MatMul", "FusedGemm", "FusedMatMul"})
REORDERS = frozenset({"ReorderInput", "ReorderOutput"})
BEFORE_BLOCKING, OPTIMISED, WEIGHTS = "extended.onnx", "optimised.onnx", "weights.bin"
ITEMSIZES = {"float": 4, "double": 8, "float16": 2, "bfloat16": 2}
Events = list[dict[str, Any]]


class Profiled(Protocol):
    """A session of onnxruntime."""

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]: ...

    def end_profiling(self) -> Path: ...


Load = Callable[[Callable[[Any], None]], Profiled]


def profiled(load: Load, x: Feeds | np.ndarray, runs: int, folder: Path) -> tuple[RanLayer, ...]:
    """Every node in the order it ran, with its median time over `runs`. `load`: a session with options as they are changed;
    `folder`: for graphs and profile. Raises BackendFailed where runs differ."""

    def with_profile(options: Any) -> None:
        _written(options, folder / OPTIMISED)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")

    session = load(with_profile)
    once = session.timer(x)
    for _ in range(WARM_UP_RUNS + runs):
        once()
    events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    nodes = _read(folder / OPTIMISED)
    if any(node.is_blocked for node in nodes):
        load(lambda options: _before_blocking(options, folder / BEFORE_BLOCKING))
        nodes = _unblocked(nodes, _read(folder / BEFORE_BLOCKING))
    return typical([_layers(run, nodes) for run in _runs(events)[-runs:]], "onnxruntime")


def _written(options: Any, path: Path) -> None:
    """Have the optimised graph written, its weights beside it: there may be more of them than a protobuf holds."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.stem}.{WEIGHTS}")


def _before_blocking(options: Any, path: Path) -> None:
    import onnxruntime

    _written(options, path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


@dataclass(frozen=True, slots=True)
class _Node:
    """`weights`: shape of its second input where that is stored, else empty; `transposed`: of its first."""

    name: str
    operator: str
    domain: str
    outputs: tuple[str, ...]
    stride: Shape
    groups: int
    weights: Shape
    transposed: bool

    @property
    def is_blocked(self) -> bool:
        return self.domain == BLOCKED_DOMAIN and self.operator in CONVOLUTIONS


def _read(path: Path) -> list[_Node]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    stored = {item.name: tuple(item.dims) for item in graph.initializer}
    return [_node(node, stored) for node in graph.node]


def _node(node: onnx.NodeProto, stored: Mapping[str, Shape]) -> _Node:
    said = {item.name: item for item in node.attribute}
    weights = stored.get(node.input[1], ()) if len(node.input) > 1 else ()
    stride = tuple(said["strides"].ints) if "strides" in said else (1,) * max(len(weights) - 2, 0)
    return _Node(
        node.name, node.op_type, node.domain, tuple(node.output), stride, said["group"].i if "group" in said else 1, weights,
        "transA" in said and said["transA"].i == 1,
    )  # fmt: skip


def _unblocked(nodes: Sequence[_Node], before: Sequence[_Node]) -> list[_Node]:
    """Blocked convolutions with the channels that they had in the graph before. Raises BackendFailed where that is not told."""
    makers = {output: node for node in before for output in node.outputs}
    return [_as_before(node, makers) if node.is_blocked else node for node in nodes]


def _as_before(node: _Node, makers: Mapping[str, _Node]) -> _Node:
    named = BLOCKED.fullmatch(node.name)
    value = named[1] if named else ""
    maker, norm = makers.get(value), makers.get(value.removesuffix(NORM))
    if maker is not None and maker.operator in CONVOLUTIONS and maker.weights:
        return replace(node, weights=maker.weights, groups=maker.groups)
    if norm is not None and norm.operator == "BatchNormalization" and norm.weights:
        (channels,) = norm.weights
        return replace(node, weights=(channels, 1, 1, 1), groups=channels)
    raise BackendFailed(f"onnxruntime's graphs do not tell which convolution {node.name} was")


def _runs(events: Events) -> list[Events]:
    """The nodes of each run, in their order."""
    found: list[Events] = [[]]
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(NODE_END):
            found[-1].append(event)
        elif event["name"] == RUN_END:
            found.append([])
    return found[:-1]


def _layers(run: Events, nodes: Sequence[_Node]) -> list[RanLayer]:
    named = {node.name: node for node in nodes if node.name}
    unnamed: dict[str, Iterator[_Node]] = {}
    layers = []
    for event in run:
        name, operator = event["name"].removesuffix(NODE_END), event["args"]["op_name"]
        if name not in named and operator not in unnamed:
            unnamed[operator] = iter([node for node in nodes if not node.name and node.operator == operator])
        node = named.get(name) or next(unnamed[operator], None)  # onnxruntime runs the nodes in the order of its graph
        layers.append(_layer(name, event, node))
    return layers


def _layer(name: str, event: Mapping[str, Any], node: _Node | None) -> RanLayer:
    told = event["args"]
    operator, provider, seconds = told["op_name"], told["provider"], event["dur"] / 1e6
    inputs, outputs = (_shapes(told.get(f"{side}_type_shape", ())) for side in ("input", "output"))
    kind = _kind(operator)
    place = "MLAS" if provider == "CPUExecutionProvider" and kind != "other" else provider
    label = f"nchwc.{operator}" if node is not None and node.domain == BLOCKED_DOMAIN else operator
    implementation = f"{place} {label}"
    itemsize = _itemsize(told.get("input_type_shape", ()))
    weights = (node.weights if node is not None else ()) or (inputs[1] if len(inputs) > 1 else ())
    if kind == "convolution" and node is not None and len(weights) > 2 and len(inputs[0]) == len(weights):
        batch, _, *places = inputs[0]
        return convolution(
            name, implementation, seconds, input_shape=(batch, weights[1] * node.groups, *places), weight_shape=weights,
            output_shape=(batch, weights[0], *outputs[0][2:]), stride=node.stride,
            biased=any(len(shape) == 1 for shape in inputs[2:]), itemsize=itemsize,
            added=sum(math.prod(shape) for shape in inputs[2:] if len(shape) == len(weights)),
        )  # fmt: skip
    if kind == "matmul" and min(len(inputs[0]), len(weights), len(outputs[0])) > 1:
        first = (*inputs[0][:-2], *reversed(inputs[0][-2:])) if node is not None and node.transposed else inputs[0]
        return matrix_product(
            name, implementation, seconds, first=first, second=(*weights[:-2], first[-1], outputs[0][-1]),
            output_shape=outputs[0], biased=any(len(shape) == 1 for shape in inputs[1:]), itemsize=itemsize,
        )  # fmt: skip
    moved = sum(int(told.get(what, 0)) for what in ("activation_size", "parameter_size", "output_size"))
    return RanLayer(
        name, "reorder" if kind == "reorder" else "other", implementation, seconds, input_shape=inputs[0] if inputs else (),
        output_shape=outputs[0] if outputs else (), bytes=moved,
    )  # fmt: skip


def _kind(operator: str) -> LayerKind:
    if operator in CONVOLUTIONS:
        return "convolution"
    if operator in PRODUCTS:
        return "matmul"
    return "reorder" if operator in REORDERS else "other"


def _shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> list[Shape]:
    """As the profile writes them: a list of {type: sizes}."""
    return [tuple(sizes) for item in told for sizes in item.values()]


def _itemsize(told: Sequence[Mapping[str, object]]) -> int:
    return next((ITEMSIZES.get(name, FLOAT32) for item in told for name in item), FLOAT32)

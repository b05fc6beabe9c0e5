"""The overflow guard: which layers cannot be written in float16, found by running the network and looking at its weights.

It is values that do not fit, so every node that makes or reads such a value stays wide: a cast in front of the reader would
overflow just the same. Source: IEEE 754 binary16 (largest 65504, smallest normal 2^-14).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy.graph.interpreter import Interpreter, Values, evaluate

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14
HEADROOM = 4.0
"""What sample data may reach is this much below the largest number: other images go further."""
WEIGHT_LOSS = 2.0**-10
"""Relative L2 change of a tensor by rounding; normal numbers lose 2^-12 on average and 2^-11 at most."""
TERM_LOSS = 2.0**-11
"""What rounding may change of a term, over the largest value of the sum: no more than rounding the sum itself does."""
TERMS: Mapping[str, tuple[int, ...]] = {"Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "Add": (0, 1), "Sub": (0, 1)}
"""Inputs that are added to something: tiny ones are no loss beside a large sum."""


def too_wide_for_half(model: ir.Model, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, str]:
    """Layers, by name, that float16 cannot hold, and why. `model`: typed, named and in float32."""
    reasons: dict[str, str] = {}
    ranges = _ranges(model, feeds)
    for node in model.graph:
        reach = ranges.get(node.outputs[0], (0.0, 0.0))[0]
        for index, value in enumerate(node.inputs):
            harmless = reach * TERM_LOSS if node.op_type in TERMS and index in TERMS[node.op_type] else 0.0
            if value is not None and (reason := _weights_reason(value, harmless)):
                reasons.setdefault(node.name or "", reason)
    for value, (largest, smallest) in ranges.items():
        reason = _range_reason(largest, smallest)
        if not reason:
            continue
        producer = value.producer()
        if producer is not None:
            reasons[producer.name or ""] = reason
        for node, _ in value.uses():
            source = (producer.name if producer is not None else value.name) or ""
            reasons.setdefault(node.name or "", f"it reads {source}, which {reason.removeprefix('its output ')}")
    return reasons


def _ranges(model: ir.Model, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[ir.Value, tuple[float, float]]:
    """Per floating point value: the largest magnitude, over all feeds, and that of the feed where it is smallest."""
    graph = model.graph
    watch = _Watching(model.opset_imports[""])
    stored = watch.stored(graph)
    for feed in feeds:
        known = stored | {value: watch.tensor(feed[name]) for value in graph.inputs if (name := value.name or "") in feed}
        for value in graph.inputs:
            watch.note(value, known[value])
        evaluate(watch, graph, known, graph.outputs)
    return watch.seen


class _Watching(Interpreter):
    """An interpreter that remembers how large each result was."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset, torch.float32, rounds=True)
        self.seen: dict[ir.Value, tuple[float, float]] = {}

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Values:
        results = super().run(node, inputs)
        for value, x in zip(node.outputs, results, strict=False):
            self.note(value, x)
        return results

    def note(self, value: ir.Value, x: object) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
            return
        size = float(x.abs().max())
        largest, smallest = self.seen.get(value, (0.0, size))
        self.seen[value] = max(largest, size), min(smallest, size)


def _range_reason(largest: float, smallest: float) -> str:
    if largest > LARGEST / HEADROOM:
        return f"its output reaches {largest:.3g} on the sample data; float16 ends at {LARGEST:.0f}"
    if smallest > 0 and largest < SMALLEST_NORMAL:
        return f"its output stays below {largest:.1e}, where float16 has no normal numbers"
    return ""


def _weights_reason(value: ir.Value, harmless: float) -> str:
    """`harmless`: an absolute change that does not matter where the values are used."""
    if value.const_value is None or value.dtype != ir.DataType.FLOAT or not value.const_value.size:
        return ""
    array = value.const_value.numpy()
    largest = float(np.abs(array).max())
    if largest > LARGEST:
        return f"its weights reach {largest:.3g}; float16 ends at {LARGEST:.0f}"
    wide = array.astype(np.float64)
    change = array.astype(np.float16).astype(np.float64) - wide
    if float(np.abs(change).max()) <= harmless:
        return ""
    norm = float(np.linalg.norm(wide))
    loss = float(np.linalg.norm(change)) / norm if norm else 0.0
    if loss > WEIGHT_LOSS and _share_below(array) > 0:
        share = _share_below(array)
        return f"{share:.0%} of its weights in {value.name} are subnormal in float16 (rounding changes them by {loss:.1%})"
    return ""


def _share_below(array: np.ndarray) -> float:
    held = array[array != 0]
    return float(np.mean(np.abs(held) < SMALLEST_NORMAL)) if held.size else 0.0

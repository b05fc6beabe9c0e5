"""Where reduced precision costs most: which layers to keep in float32 when a graph as a whole drifts too far.

A layer goes with the operators behind it, up to the next layers: narrow activations would round what a wide layer computed.
Each such stretch is narrowed alone and its effect on the outputs is measured; the errors of different ones add up like
independent ones, so the costliest are kept until what is left fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from repdeploy import gates
from repdeploy.exporters.casting import Keep, narrowed, swept
from repdeploy.exporters.drift import LAYERS
from repdeploy.exporters.interface import Case
from repdeploy.graph.typed import TypedGraph
from repdeploy.progress import Progress, each

INPUT = "the input"
"""What operators in front of the first layer go with."""
SHARE = 0.7
"""Of the budget: what the layers that stay narrow may cost by this estimate."""

Stretches = Mapping[str, Sequence[str]]
"""Per layer the names of its own node and of those that go with it."""


def stretches(graph: Iterable[ir.Node]) -> Stretches:
    """Every node of a graph, by the layer that computes what it reads (the last one, where there are several)."""
    order = {node: index for index, node in enumerate(graph)}
    owners: dict[ir.Node, str] = {}
    found: dict[str, list[str]] = {}
    for node in order:
        producers = [made for value in node.inputs if value is not None and (made := value.producer()) in order]
        last = max(producers, key=order.__getitem__, default=None)
        owners[node] = (node.name or "") if node.op_type in LAYERS else owners[last] if last is not None else INPUT
        found.setdefault(owners[node], []).append(node.name or "")
    return found


def costs(model: ir.Model, to: ir.DataType, keep: Keep, cases: Sequence[Case], progress: Progress) -> dict[str, float]:
    """What each stretch costs by itself, max|a-b| / max|a| of the outputs in the worst case, the costliest first.

    `model`: as `casting.prepared` gave it.
    """
    held = {node.name or "" for node in keep.reasons(list(model.graph))}
    wide = TypedGraph(model)
    exact = [wide.run(case.feeds) for case in cases]
    found = {}
    for name, nodes in each(progress, "measuring what each layer's precision costs", list(stretches(model.graph).items())):
        alone = set(nodes) - held
        if not alone:
            continue
        rest = Keep(("none",), {node.name or "": "" for node in model.graph if node.name not in alone})
        cast = swept(narrowed(model, to, rest, narrow_ends=False).model)
        typed = TypedGraph(cast)
        found[name] = max(_error(typed.run(case.feeds), wanted) for case, wanted in zip(cases, exact, strict=True))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def to_keep(costs: Mapping[str, float], budget: float, least: int) -> Sequence[str]:
    """The costliest layers, at least that many, so that the others together stay within the budget by the estimate."""
    names = list(costs)
    for count in range(least, len(names)):
        if math.hypot(*(costs[name] for name in names[count:])) <= SHARE * budget:
            return names[:count]
    return names


def _error(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    errors = [gates.relative_error(got[name], tensor) for name, tensor in exact.items()]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)

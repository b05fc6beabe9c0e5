"""Gates 2 to 5 on the graph road: the whole graph, original against squeezed, in float64 and as onnxruntime runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.errors import BackendFailed
from repdeploy.graph.interpreter import Interpreter, evaluate
from repdeploy.graph.known import Known
from repdeploy.graph.region_proof import FOLDED_BUDGET
from repdeploy.graph.regions import living
from repdeploy.graph.sample_inputs import Arrays, InputPlan
from repdeploy.graph.squeezer import Squeezed
from repdeploy.records import Check
from repdeploy.runtimes.onnx_runtime import OnnxSession

PRECISIONS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.DOUBLE: "fp64",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}  # fmt: skip
"""What the budgets and file names call ONNX's types."""
MOST_NOISE = 0.05
"""Of the outputs, rms: what the original's own rounding may cost; deep networks reach 1e-3 in float32, 1e-2 in float16."""
FLIPS = 0.01
"""Of an output of whole numbers (classes, indices): the share that float32's noise may turn."""


@dataclass(frozen=True, slots=True)
class References:
    """What a graph was run on and what it answers in float64, per set of inputs: (sets, ...) each."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Proof:
    checks: tuple[Check, ...]
    references: References | None
    notes: tuple[str, ...]


def runnable(path: Path, tried: Sequence[InputPlan]) -> tuple[InputPlan, str]:
    """The first plan that onnxruntime runs, and what it said to the last one where it runs none."""
    said = ""
    try:
        session = OnnxSession(path)
    except BackendFailed as reason:
        return tried[0], str(reason)
    for plan in tried:
        try:
            session.run_all(plan.arrays(0))
        except BackendFailed as reason:
            said = str(reason)
        else:
            return plan, ""
    return tried[0], said


def exact_outputs(
    model: ir.Model, feeds: Sequence[Arrays], exact: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """A graph in float64, per set of inputs; outputs behind an operator that nothing here runs are left out.

    `exact`: stored tensors, by name, to be replaced by what they were rounded from.
    """
    known, graph = Known(model, exact=exact), model.graph
    interpreter = Interpreter(known.opset)
    order = living(graph, known)
    found = []
    with gates.exact_arithmetic():
        for arrays in feeds:
            inputs = {value: interpreter.tensor(arrays[value.name or ""]) for value in graph.inputs if value.name in arrays}
            results = evaluate(interpreter, order, known.constants | inputs, graph.outputs, skip=True)
            tensors = {value.name or "": results[value] for value in graph.outputs if value in results}
            found.append({name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    return found


def prove_model(
    original: ir.Model, squeezed: ir.Model, source: Path, written: Path, done: Squeezed, plan: InputPlan, seed: int
) -> Proof:
    """Every output, in every precision that it can be checked in. `original` and `squeezed` as they lie in the two files."""
    batch = next(iter(plan.shapes[plan.image]), 1)
    sets = max(1, -(-gates.POOLED_IMAGES // batch))
    feeds = [plan.arrays(seed + index) for index in range(sets)]
    if plan.open_batch:  # a second batch size
        feeds.append(plan.with_batch(1).arrays(seed + sets))
    reference = exact_outputs(original, feeds)
    exact = {key: tensor for region in done.regions for key, tensor in region.placed.stored.items()}
    ours = exact_outputs(squeezed, feeds, exact)
    loose = any(not region.is_exact for region in done.regions)
    names = list(dict.fromkeys(value.name or "" for value in original.graph.outputs))
    checks, notes = [], []
    for name in names:
        if all(name in found for found in (*reference, *ours)):
            subject = f"{_label(name, names)}float64, original against squeezed"
            checks.append(_network(subject, [f[name] for f in ours], [f[name] for f in reference], loose))
        else:
            notes.append(f"output {name} was checked in float32 only: an operator before it runs in onnxruntime alone")
    try:
        session = OnnxSession(source)
        before = [session.run_all(arrays) for arrays in feeds]
    except BackendFailed as reason:
        if not checks:
            raise
        notes.append(f"nothing was checked in onnxruntime: {reason}")
    else:
        after = _after(written, feeds)
        if isinstance(after, Check):
            return Proof((*checks, after), None, tuple(notes))
        for name in names:
            if not isinstance(before[0][name], np.ndarray) or before[0][name].dtype.kind not in "fiub":
                notes.append(f"output {name} was not checked: it is no tensor of numbers")
                continue
            wanted = [f[name] for f in reference] if all(name in f for f in reference) else None
            checks.append(_rounding(_label(name, names), [f[name] for f in before], [f[name] for f in after], wanted))
    kept = reference[:sets]
    complete = all(name in found and found[name].shape == kept[0][name].shape for name in names for found in kept)
    stacked = References(
        {name: np.stack([arrays[name] for arrays in feeds[:sets]]) for name in plan.shapes},
        {name: np.stack([found[name].numpy() for found in kept]) for name in names if complete},
    )
    return Proof(tuple(checks), stacked if complete else None, tuple(notes))


def _after(written: Path, feeds: Sequence[Arrays]) -> list[Arrays] | Check:
    """What the squeezed file answers, or the check that fails because it does not run where the original does."""
    try:
        session = OnnxSession(written)
        return [session.run_all(arrays) for arrays in feeds]
    except BackendFailed as reason:
        return Check("rounding", f"{written.name} in onnxruntime", float("inf"), 0.0, failure=f"the original runs: {reason}")


def _label(name: str, names: Sequence[str]) -> str:
    return f"{name}: " if len(names) > 1 else ""


def _network(subject: str, got: Sequence[Tensor], wanted: Sequence[Tensor], loose: bool) -> Check:
    """Gate 2 for one output."""
    budget = FOLDED_BUDGET if loose else gates.NETWORK_BUDGET
    failures = [failure for ours, theirs in zip(got, wanted, strict=True) if (failure := gates.output_failure(ours, theirs))]
    if failures:
        return Check("network", subject, float("inf"), budget, failure=failures[0])
    error = max(gates.relative_error(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
    return Check("network", subject, error, budget, detail="an exporter folded norms in float32" if loose else "")


def _rounding(label: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray], wanted: Sequence[Tensor] | None) -> Check:
    """Gate 3 for one output, as onnxruntime computes it: against the original's own noise where float64 is known."""
    kind = before[0].dtype
    shapes = f"{len(before)} sets of inputs"
    for ours, theirs in zip(after, before, strict=True):
        if failure := gates.output_failure(torch.from_numpy(ours), torch.from_numpy(theirs)):
            return Check("rounding", f"{label}{kind} in onnxruntime", float("inf"), 0.0, failure=failure)
    if kind.kind != "f":
        differ = max(float(np.mean(a != b)) if a.size else 0.0 for a, b in zip(after, before, strict=True))
        return Check("rounding", f"{label}{kind} in onnxruntime, {shapes}", differ, FLIPS, "share of values that differ")
    got, original = (torch.cat([torch.from_numpy(array).double().flatten() for array in arrays]) for arrays in (after, before))
    if wanted is None:
        error, budget = gates.relative_error(got, original), gates.PRECISION_BUDGETS[PRECISIONS[ir.DataType.from_numpy(kind)]]
        return Check("rounding", f"{label}{kind} in onnxruntime against the original", error, budget)
    reference = torch.cat([tensor.double().flatten() for tensor in wanted])
    floor, unit = gates.rms(original - reference), float(np.finfo(kind).eps) / 2
    if floor > MOST_NOISE * gates.rms(reference):  # then the reference is not that of this graph
        failure = f"the original graph in onnxruntime is off by {floor:.1e} from its meaning in float64"
        return Check("rounding", f"{label}{kind} in onnxruntime", float("inf"), 0.0, failure=failure)
    return Check(
        "rounding",
        f"{label}{kind} in onnxruntime, rms over {shapes}",
        gates.rms(got - reference),
        gates.ROUNDING_FACTOR * floor + 8 * unit * gates.rms(reference),
        "rms(squeezed - reference)",
        detail=f"the original itself is off by {floor:.1e}; outputs have rms {gates.rms(reference):.1e}",
    )

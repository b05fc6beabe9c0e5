"""Gate 4: artifacts against the recorded float64 references, each precision by what can judge it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.errors import BackendFailed, InputError
from repdeploy.exporters.interface import Case, Feeds
from repdeploy.graph.interpreter import CannotInterpret
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.typed import TypedGraph
from repdeploy.records import Check
from repdeploy.runtimes.onnx_runtime import OnnxSession

RUNS = "1 where it does not load or run"
REDUCED_TYPES = {ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT16: "fp16"}
REDUCED = tuple(REDUCED_TYPES.values())


def judged(
    run: Callable[[Feeds], Mapping[str, np.ndarray | Tensor]], cases: Sequence[Case], precision: str, subject: str
) -> list[Check]:
    """Every case through `run`; where there are several outputs, the worst one speaks."""
    checks = []
    for case in cases:
        found = run(case.feeds)
        of_outputs = [
            gates.artifact_check(f"{subject}, {case.label}", _tensor(found.get(name)), torch.from_numpy(wanted), precision)
            for name, wanted in case.wanted.items()
        ]
        checks.append(max(of_outputs, key=lambda check: (not check.passed, check.error)))
    return checks


def onnx_checks(path: Path, precision: str, cases: Sequence[Case]) -> tuple[list[Check], tuple[str, ...]]:
    """An ONNX file, and what is to be noted: float32 as onnxruntime computes it; lower precisions as their types say, and then
    onnxruntime only has to load and run the file, since its CPU leaves roundings out."""
    if precision not in REDUCED:
        return _in_onnxruntime(path, precision, cases), ()
    try:
        graph = TypedGraph(read_onnx(path).model)
        checks = judged(graph.run, cases, precision, f"{path.name} executed by its types")
    except CannotInterpret as reason:
        failure = f"it cannot be executed by its types: {reason}"
        return [Check("artifact", path.name, float("inf"), gates.PRECISION_BUDGETS[precision], failure=failure)], ()
    try:
        return [*checks, _runs(path, cases)], ()
    except BackendFailed as reason:
        if precision == "bf16" and "NOT_IMPLEMENTED" in str(reason):
            return checks, ("onnxruntime's CPU has no bfloat16 convolutions: the graph was judged by typed execution alone",)
        failure = str(reason)
        return [*checks, Check("artifact", f"{path.name} in onnxruntime", 1.0, 0.0, RUNS, failure=failure)], ()


def _in_onnxruntime(path: Path, precision: str, cases: Sequence[Case]) -> list[Check]:
    """As onnxruntime computes it; in our float64 where a graph is not for onnxruntime's CPU (float64, foreign operators)."""
    try:
        session = OnnxSession(path)
        return judged(session.run_all, cases, precision, f"{path.name} in onnxruntime")
    except BackendFailed:
        from repdeploy.graph.model_proof import exact_outputs

        model = read_onnx(path).model
        if precision == "fp32" and all(value.dtype == ir.DataType.FLOAT for value in model.graph.inputs):
            raise
        return judged(lambda feeds: exact_outputs(model, [feeds])[0], cases, precision, f"{path.name} in float64")


def _runs(path: Path, cases: Sequence[Case]) -> Check:
    """Raises BackendFailed where it does not."""
    model = read_onnx(path).model
    types = {value.name or "": value.dtype for value in model.graph.inputs}
    session = OnnxSession(path)
    failure = ""
    for case in cases:
        feeds = {name: array.astype(_numpy(types.get(name), array)) for name, array in case.feeds.items()}
        for name, result in session.run_all(feeds).items():
            if name in case.wanted and (said := gates.output_failure(_tensor(result), torch.from_numpy(case.wanted[name]))):
                failure = failure or f"{case.label}: {said}"
    return Check("artifact", f"{path.name} loads and runs in onnxruntime", float(bool(failure)), 0.0, RUNS, failure=failure)


def _numpy(dtype: ir.DataType | None, array: np.ndarray) -> np.dtype:
    return array.dtype if dtype is None else np.dtype(dtype.numpy())


def _tensor(found: np.ndarray | Tensor | None) -> Tensor:
    if found is None:
        return torch.zeros(0)
    return found if isinstance(found, Tensor) else torch.from_numpy(np.array(found, widest(found)))


def widest(array: np.ndarray) -> np.dtype:
    """numpy's types that torch does not read, as one that it does."""
    return array.dtype if array.dtype.kind in "iub" or array.dtype in (np.float32, np.float64) else np.dtype(np.float32)


def renamed(checks: Sequence[Check], old: str, new: str) -> tuple[Check, ...]:
    """Checks of a file that has got another name since."""
    return tuple(replace(check, subject=check.subject.replace(old, new)) for check in checks)


def precision_of(model: ir.Model) -> str:
    """The lowest precision among a graph's weights."""
    kinds = {value.dtype for value in model.graph.initializers.values()}
    return next((name for kind, name in REDUCED_TYPES.items() if kind in kinds), "fp32")


def describe(check: Check) -> str:
    """A failed check in words."""
    return f"{check.subject}: {check.failure or f'error {check.error:.3g}, budget {check.budget:.3g}'}"


def require_float(model: ir.Model) -> None:
    """Raises InputError where a graph is not in float32 and cannot be cast from there."""
    values = (*model.graph.inputs, *model.graph.initializers.values())
    floats = {value.dtype for value in values if value.dtype is not None and value.dtype.is_floating_point()}
    if floats - {ir.DataType.FLOAT}:
        raise InputError(
            f"this graph is in {' and '.join(sorted(item.name.lower() for item in floats))}; only float32 graphs are changed",
            hint="export it as it is, to any target, or convert the model in float32",
        )

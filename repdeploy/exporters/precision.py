"""A float32 graph written in the precision asked for, and proved: guard, cast, check, and keep more where it drifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from repdeploy.errors import VerificationFailed
from repdeploy.exporters import casting, onnx_file, sensitivity
from repdeploy.exporters.drift import drift
from repdeploy.exporters.interface import Case
from repdeploy.exporters.judging import describe, judged, onnx_checks, require_float
from repdeploy.exporters.options import Options
from repdeploy.exporters.overflow import too_wide_for_half
from repdeploy.gates import PRECISION_BUDGETS
from repdeploy.graph.onnx_source import require_valid, write_proto
from repdeploy.graph.typed import TypedGraph
from repdeploy.progress import Progress
from repdeploy.records import Check, Drift, WideLayer


@dataclass(frozen=True, slots=True)
class Proved:
    """A written graph: the files beside it, and all that was found out about it."""

    others: tuple[str, ...]
    opset: int
    checks: tuple[Check, ...]
    wide: tuple[WideLayer, ...] = ()
    drift: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()


def write_proved(
    wide: onnx.ModelProto,
    path: Path,
    cases: Sequence[Case],
    options: Options,
    provenance: Mapping[str, str],
    progress: Progress,
    sample: Sequence[Case] = (),
) -> Proved:
    """Write a float32 graph as `options` ask, and hold it against the references. `sample`: more inputs for the guard.

    A graph in reduced precision that misses its budget is written again with the costliest layers in float32.
    Raises VerificationFailed where it is not the proved network, BackendFailed where the graph is not valid.
    """
    if options.precision not in casting.PRECISIONS:
        return _written(wide, path, cases, options, provenance, progress)
    require_valid(wide)
    model = casting.prepared(ir.from_proto(wide))
    require_float(model)
    # what is wrong in float32 already is not its precision's fault
    require_passed(path.name, judged(TypedGraph(model).run, cases, "fp32", f"{path.name} before it is cast"))
    found: dict[str, str] = {}
    if options.precision == "fp16":
        progress("looking for what float16 cannot hold", 1, 3)
        found |= too_wide_for_half(model, [case.feeds for case in (*cases, *sample)])
    to, costs, kept = casting.PRECISIONS[options.precision], None, 0
    while True:
        done = casting.narrowed(model, to, casting.Keep(options.keep, found), narrow_ends=options.io != "fp32")
        cast = ir.to_proto(casting.swept(done.model))
        try:
            proved = _written(cast, path, cases, options, provenance, progress, done.wide)
        except VerificationFailed:
            if costs is None:
                keep = casting.Keep(options.keep, found)
                costs = sensitivity.costs(model, to, keep, _different(cases), progress)
            more = sensitivity.to_keep(costs, PRECISION_BUDGETS[options.precision], least=max(1, 2 * kept))
            if len(more) == kept or not more:  # all of them already: it is not their precision
                raise
            kept = len(more)
            with_them = sensitivity.stretches(model.graph)
            for name in more:
                found |= dict.fromkeys(
                    with_them[name], f"in {options.precision}, {name} alone moves the outputs by {costs[name]:.1e}"
                )
        else:
            break
    notes = proved.notes
    if kept:
        notes += (f"in {options.precision} throughout it missed its budget: the {kept} costliest layers stay in float32",)
    drifts = drift(model, path, cases[0])
    return Proved(proved.others, proved.opset, proved.checks, done.wide, drifts, notes)


def require_passed(name: str, checks: Sequence[Check], wide: Sequence[WideLayer] = ()) -> None:
    """Raises VerificationFailed for the first check that did not."""
    failed = next((check for check in checks if not check.passed), None)
    if failed is None:
        return
    hint = "please report this with the versions that repdeploy doctor prints"
    if wide or any(check.budget > PRECISION_BUDGETS["tf32"] for check in checks):  # a reduced precision
        hint = "keep what drifts in float32 (--keep-fp32 LAYER, OPERATOR or regular expression), or export --precision fp32"
    raise VerificationFailed(f"{name} is not the proved network: {describe(failed)}; it was not written", hint=hint)


def _written(
    proto: onnx.ModelProto,
    path: Path,
    cases: Sequence[Case],
    options: Options,
    provenance: Mapping[str, str],
    progress: Progress,
    wide: Sequence[WideLayer] = (),
) -> Proved:
    onnx_file.stamp(proto, provenance)
    opset = onnx_file.opset_of(proto)
    others = write_proto(proto, path)
    progress("verifying ONNX", 2, 3)
    checks, notes = onnx_checks(path, options.precision, cases)
    require_passed(path.name, checks, wide)
    return Proved(others, opset, tuple(checks), notes=notes)


def _different(cases: Sequence[Case]) -> list[Case]:
    """Those that are not just the beginning of another one, as batch 1 is of batch 5."""
    return [case for case in cases if not any(_begins(case, other) for other in cases if other is not case)]


def _begins(case: Case, other: Case) -> bool:
    return all(
        array.ndim and len(array) < len(other.feeds[name]) and np.array_equal(array, other.feeds[name][: len(array)])
        for name, array in case.feeds.items()
    )

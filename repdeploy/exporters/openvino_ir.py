"""OpenVINO's IR: model.xml and model.bin, judged in float32 and in what the platform chooses by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repdeploy.errors import BackendFailed, words
from repdeploy.exporters.interface import Case, Exporter, Source, Written
from repdeploy.exporters.judging import judged
from repdeploy.gates import PRECISION_BUDGETS
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check
from repdeploy.runtimes.interface import Missing
from repdeploy.runtimes.openvino_cpu import OpenVinoSession, missing

BUDGET_OF = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class OpenVinoExporter(Exporter):
    name, title = "openvino", "OpenVINO IR"

    def missing(self) -> Missing | None:
        return missing()

    def write(self, source: Source, progress: Progress) -> Written:
        import openvino

        precision = source.artifact.precision
        stem = "model" if precision == "fp32" else f"model.{precision}"
        path = source.scratch / f"{stem}.xml"
        try:
            openvino.save_model(openvino.Core().read_model(source.onnx), path, compress_to_fp16=False)
        except Exception as reason:  # its errors have no base of their own
            said = words(reason)
            raise BackendFailed(f"OpenVINO cannot read {source.onnx.name}: {said}") from reason
        checks, note = _checks(path, precision, source.cases)
        return Written(path.name, precision, tuple(checks), others=(f"{stem}.bin",), notes=(note,))

    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        return _checks(path, artifact.precision, cases)[0]


def _checks(path: Path, precision: str, cases: Sequence[Case]) -> tuple[list[Check], str]:
    """In float32, which has to pass, and at the platform's own choice, which is told; with a sentence on both."""
    exact = OpenVinoSession(path, precision="float32")
    required = judged(exact.run_all, cases, precision, f"{path.name} in OpenVINO, float32")
    default = OpenVinoSession(path, precision=None)
    if default.precision == "float32":
        return required, f"{path.name}: float32 is this platform's default too; {_outcome(required)}"
    budget = max(precision, BUDGET_OF[default.precision], key=PRECISION_BUDGETS.__getitem__)
    told = judged(default.run_all, cases, budget, f"{path.name} in OpenVINO, {default.precision} (this platform's default)")
    note = f"{path.name}: in float32 {_outcome(required)}; in {default.precision}, this platform's default, {_outcome(told)}"
    if all(check.passed for check in told):
        return [*required, *told], note
    return required, f"{note}: set INFERENCE_PRECISION_HINT=f32 where you load it"


def _outcome(checks: Sequence[Check]) -> str:
    worst = max(checks, key=lambda check: (bool(check.failure), check.error / check.budget))
    numbers = worst.failure or f"error {worst.error:.1e}, budget {worst.budget:.0e}"
    return f"{'passed' if worst.passed else 'failed'} ({numbers})"


EXPORTER = OpenVinoExporter()

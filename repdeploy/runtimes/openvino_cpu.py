"""OpenVINO on the CPU (oneDNN kernels). Its precision is pinned: by itself it computes in bfloat16 where the processor can."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from repdeploy.errors import BackendFailed, words
from repdeploy.measurements import RanLayer
from repdeploy.runtimes import openvino_profile
from repdeploy.runtimes.interface import ONNX, Feeds, Job, Missing

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""What OpenVINO calls the precisions it may be asked for."""
CAPABILITIES = {"bfloat16": "BF16"}
"""What it calls them where it lists what a processor can do."""


def missing() -> Missing | None:
    if importlib.util.find_spec("openvino") is None:
        return Missing("OpenVINO is not installed", "pip install repdeploy[openvino]")
    return None


@dataclass(frozen=True, slots=True)
class OpenVinoCpu:
    name: str = "openvino"
    device: str = "cpu"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = ONNX

    @property
    def profile_environment(self) -> Mapping[str, str]:
        return {}

    def missing(self) -> Missing | None:
        if (absent := missing()) is not None or self.precision == "float32":
            return absent
        import openvino

        capability = CAPABILITIES[self.precision]
        offered = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if capability in offered:
            return None
        return Missing(
            f"this processor does not compute in {self.precision} (OpenVINO offers {', '.join(sorted(offered))})",
            "measure openvino, or take a processor with AVX512_BF16 or AMX",
        )

    @contextmanager
    def open(self, job: Job) -> Iterator[OpenVinoSession]:
        yield self._session(job)

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        session = self._session(job, counted=True)
        layers = openvino_profile.profiled(session.compiled, session.request, session.model, session.timer(x), runs)
        return "OpenVINO's performance counters (means)", layers

    def _session(self, job: Job, counted: bool = False) -> OpenVinoSession:
        if job.onnx is None:
            raise BackendFailed("OpenVINO needs an ONNX file")
        return OpenVinoSession(job.onnx(), precision=self.precision, threads=job.threads, counted=counted)


CPU = OpenVinoCpu()
BFLOAT16_CPU = OpenVinoCpu("openvino-bf16", precision="bfloat16", by_default=False)


class OpenVinoSession:
    """An ONNX or IR file, compiled. `precision`: None leaves it to the platform; `self.precision` says what it is then;
    `counted`: every layer's time is kept.

    Raises BackendFailed where OpenVINO does not take the file or the image. Nothing here uses its telemetry: models are read by
    the core, not by its converter.
    """

    def __init__(self, path: Path, *, precision: str | None = "float32", threads: int = 0, counted: bool = False) -> None:
        import openvino

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": counted}
        if threads:
            config |= {"INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            config |= {"INFERENCE_PRECISION_HINT": HINTS[precision]}
        try:
            core = openvino.Core()
            self.model: Any = core.read_model(path)
            self.compiled: Any = core.compile_model(self.model, "CPU", config)
            self.request: Any = self.compiled.create_infer_request()
        except Exception as reason:  # its errors have no base of their own
            raise BackendFailed(f"OpenVINO does not load {path.name}: {words(reason)}") from reason
        hint = self.compiled.get_property("INFERENCE_PRECISION_HINT")
        self.precision = str(hint.to_string() if hasattr(hint, "to_string") else hint).replace("f32", "float32")
        self.precision = {"bf16": "bfloat16", "f16": "float16"}.get(self.precision, self.precision)
        ports = (*self.compiled.inputs, *self.compiled.outputs)
        self._types = {port.get_any_name(): _array_type(port.get_element_type()) for port in ports}
        self._inputs = [port.get_any_name() for port in self.compiled.inputs]
        self._outputs = [port.get_any_name() for port in self.compiled.outputs]

    def run_all(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        try:
            self.request.infer(self._tensors(feeds))
            return {name: self.request.get_tensor(name).data.view(self._types[name]).copy() for name in self._outputs}
        except Exception as reason:
            shapes = ", ".join(str(array.shape) for array in feeds.values())
            raise BackendFailed(f"OpenVINO failed on an image of {shapes}: {words(reason)}") from reason

    def outputs(self, x: Feeds | np.ndarray) -> tuple[np.ndarray, ...]:
        """Every output, in the graph's order."""
        return tuple(self.run_all(x if isinstance(x, dict) else {self._inputs[0]: x}).values())

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        typed = self._tensors(x if isinstance(x, dict) else {self._inputs[0]: x})

        def once() -> float:
            start = time.perf_counter()
            self.request.infer(typed)
            return time.perf_counter() - start

        return once

    def _tensors(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        import openvino

        made = {}
        for name, array in feeds.items():
            typed = np.array(array, self._types[name], order="C")
            if typed.dtype == BFLOAT16:  # which numpy, and so OpenVINO, knows as two bytes only
                made[name] = openvino.Tensor(typed.view(np.uint16), list(typed.shape), openvino.Type.bf16)
            else:
                made[name] = typed
        return made


def _array_type(element: Any) -> np.dtype:
    found: np.dtype = BFLOAT16 if element.get_type_name() == "bf16" else np.dtype(element.to_dtype())
    return found

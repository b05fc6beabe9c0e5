"""TensorRT engines on a CUDA device, without torch. Written for 10.x and 11.x.

A plan is deserialised only by a caller that vouches for it: that can run code of whoever wrote it.
Source: TensorRT's Python API, the names that 10.14 and 11.4 share; the migration guide for the inspector's JSON of both majors.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from repdeploy.errors import BackendFailed, words
from repdeploy.measurements import RanLayer
from repdeploy.runtimes import cuda_memory, tensorrt_profile
from repdeploy.runtimes.cuda_memory import DeviceArrays
from repdeploy.runtimes.interface import Feeds, Job, Missing

ARRAYS: Mapping[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT8": np.dtype(np.int8), "INT32": np.dtype(np.int32), "INT64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
}  # fmt: skip
"""TensorRT's types as numpy's."""


def missing() -> Missing | None:
    """What this machine lacks to run an engine."""
    if importlib.util.find_spec("tensorrt") is None:
        return Missing("TensorRT is not installed (looked for the Python package tensorrt)", "pip install repdeploy[tensorrt]")
    return cuda_memory.missing()


def version() -> str:
    """Major and minor, which a plan is bound to."""
    import tensorrt

    return ".".join(tensorrt.__version__.split(".")[:2])


@dataclass(frozen=True, slots=True)
class TensorRtCuda:
    name: str = "tensorrt"
    device: str = "cuda"
    precision: str = "as built"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = "tensorrt"

    @property
    def profile_environment(self) -> Mapping[str, str]:
        return {}

    def missing(self) -> Missing | None:
        return missing()

    @contextmanager
    def open(self, job: Job) -> Iterator[EngineSession]:
        plan = job.compiled.get(self.needs)
        if plan is None:
            raise BackendFailed("there is no engine of this network", hint="build it with repdeploy export --trt")
        session = EngineSession(plan.path, weights=plan.weights, host_code="version_compatible" in plan.options)
        try:
            yield session
        finally:
            session.close()

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        with self.open(job) as session:
            return "TensorRT's profiler and inspector", session.ran(x, runs)


CUDA = TensorRtCuda()


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine as the inspector tells it; `types`: of its inputs and outputs; `tactic`: the kernel."""

    name: str
    kind: str
    types: tuple[str, ...]
    tactic: str = ""


class EngineSession:
    """A deserialised plan. `weights`: the ONNX file to refit it from, where its own were left out; `host_code`: a plan for
    later versions brings its own runtime, which then runs on the host.

    Raises BackendFailed where TensorRT does not take the plan, the weights or the image.
    """

    def __init__(self, path: Path, *, weights: Path | None = None, host_code: bool = False) -> None:
        import tensorrt as trt

        self._trt: Any = trt
        self._logger = quiet_logger(trt)
        runtime = trt.Runtime(self._logger)
        if host_code:
            runtime.engine_host_code_allowed = True
        self._runtime: Any = runtime
        self._engine: Any = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendFailed(
                f"TensorRT {version()} does not load {path.name}{self._logger.because()}",
                hint="a plan fits one TensorRT version and one kind of GPU: build it again here with repdeploy export --trt",
            )
        if weights is not None:
            self._refit(weights)
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise BackendFailed(f"TensorRT cannot run {path.name}{self._logger.because()}", hint="free memory on the device")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self.inputs = tuple(name for name in names if self._engine.get_tensor_mode(name) == inputs)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        self.types = {name: ARRAYS[self._engine.get_tensor_dtype(name).name] for name in names}
        self._arrays = DeviceArrays()
        self._path = path

    def profile(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Smallest, optimal and largest shape of an input."""
        return tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))

    def layers(self) -> tuple[EngineLayer, ...]:
        """What the engine really is; names only, where it was built without detailed profiling."""
        return tuple(_layer(item) for item in self._inspected())

    def ran(self, x: Feeds | np.ndarray, runs: int) -> tuple[RanLayer, ...]:
        """Every layer with its median time over `runs`, on the shapes of x. Raises BackendFailed where runs differ."""
        once = self.timer(x)
        once()
        listener = tensorrt_profile.listener(self._trt)
        self._context.profiler = listener
        for _ in range(runs):
            listener.begin()
            once()
        return tensorrt_profile.joined(listener.runs, self._inspected())

    def run_all(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, in the engine's types."""
        self._bind(feeds)
        outputs = {name: np.empty(tuple(self._context.get_tensor_shape(name)), self.types[name]) for name in self.outputs}
        for name, array in outputs.items():
            self._address(name, self._arrays.room_for(name, array.nbytes))
        self._enqueue()
        return {name: self._arrays.download(name, array) for name, array in outputs.items()}

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        """Seconds on the device for one run; the image is there already."""
        self.run_all(x if isinstance(x, dict) else {self.inputs[0]: x})  # binds every address

        def once() -> float:
            self._arrays.start()
            self._enqueue()
            return self._arrays.stop()

        return once

    def close(self) -> None:
        self._arrays.close()

    def _inspected(self) -> list[Any]:
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # without it, layers of open sizes tell less
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return list(json.loads(text).get("Layers", []))

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name in self.inputs:
            array = np.array(feeds[name], self.types[name], order="C")
            if not self._context.set_input_shape(name, array.shape):
                low, _, high = self.profile(name)
                raise BackendFailed(
                    f"{self._path.name} takes {name} from {'x'.join(map(str, low))} to {'x'.join(map(str, high))}, not "
                    f"{'x'.join(map(str, array.shape))}",
                    hint="build it for that batch with repdeploy export --trt --min N --opt N --max N",
                )
            self._address(name, self._arrays.upload(name, array))

    def _address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BackendFailed(f"TensorRT takes no address for {name}{self._logger.because()}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._arrays.stream)):
            raise BackendFailed(f"{self._path.name} did not run{self._logger.because()}")

    def _refit(self, weights: Path) -> None:
        trt, held = self._trt, []
        try:
            refitter = trt.Refitter(self._engine, self._logger)
        except TypeError as reason:  # as the bindings answer for an engine that cannot be refitted
            raise BackendFailed(f"this engine takes no weights: {reason}") from reason
        stored = _stored(weights)
        names = {value: key for key, value in ARRAYS.items()}
        for name in refitter.get_all_weights():
            array = stored.get(name)
            if array is None or array.dtype not in names:
                continue  # told below, if it is needed
            held.append(array)  # TensorRT reads them when it refits
            kind = getattr(trt.DataType, names[array.dtype])
            if not refitter.set_named_weights(name, trt.Weights(kind, array.ctypes.data, array.size)):
                raise BackendFailed(f"TensorRT does not take {name!r} of {weights.name}{self._logger.because()}")
        missing = refitter.get_missing_weights()
        if missing:
            raise BackendFailed(
                f"{weights.name} has not all weights that the plan was stripped of: {', '.join(missing[:3])}",
                hint="build it without --strip-weights",
            )
        if not refitter.refit_cuda_engine():
            raise BackendFailed(f"TensorRT could not put the weights of {weights.name} back{self._logger.because()}")


def _stored(onnx_file: Path) -> dict[str, np.ndarray]:
    """The constants of a graph, by the names under which TensorRT's parser refits them."""
    import onnx

    graph = onnx.load(onnx_file).graph
    found = {item.name: item for item in graph.initializer}
    for node in graph.node:
        for item in node.attribute if node.op_type == "Constant" else ():
            if item.name == "value":
                found[node.output[0]] = item.t
    return {name: np.ascontiguousarray(onnx.numpy_helper.to_array(item)) for name, item in found.items()}


def quiet_logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's errors for our own messages."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def because(self) -> str:
            """The last error, to be put behind a sentence."""
            return f": {words(self.errors[-1])}" if self.errors else ""

    return Logger()


def _layer(item: Any) -> EngineLayer:
    if isinstance(item, str):
        return EngineLayer(item, "", ())
    tensors = [tensor for side in ("Inputs", "Outputs") for tensor in item.get(side, ()) if isinstance(tensor, dict)]
    found = (tensorrt_profile.type_of(tensor) for tensor in tensors)
    return EngineLayer(
        item.get("Name", ""), item.get("LayerType", ""), tuple(name for name in found if name), str(item.get("TacticName", ""))
    )

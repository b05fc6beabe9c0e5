"""A strict stand-in for NVIDIA's `tensorrt`, for machines without it. It proves names, calls, arities and enums; no numbers.

`install(monkeypatch, "10.14")` puts it, and one for `cuda.bindings.runtime`, in the place of the real modules. Its classes are
generated from the listings beside this file, which come from the public Python bindings of TensorRT 10.14 and 11.4: a name
that a version lacks does not exist, a call with wrong arguments raises TypeError, and what exists but is not simulated raises
NotImplementedError. A "plan" is the ONNX file with its profiles, and an engine runs it with onnxruntime on the CPU: what
TensorRT would choose, fuse, round or refuse beyond the rules coded here is not known. A plan built with STRIP_PLAN has no
floating point weights (NVIDIA's keeps some), and its engine does not run before a `Refitter` has given them back; that some
weights can be set only together with others is not simulated. `trt.nptype`, `trt.volume`,
`trt.float32` and the `with` statement live in the package around the bindings; the listings lack them, so here they do not
exist.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tests.standins import cuda_runtime
from tests.standins.graph import (
    KINDS,
    Graph,
    Layer,
    Program,
    Shape,
    Tensor,
    dtype_of,
    node_name,
    refittable,
    refitted,
    stripped,
)
from tests.standins.strict import NOT_SIMULATED, Behaviour, Bindings, Callback, flags, listing, product

if TYPE_CHECKING:
    import onnx
    import pytest

PLAN = b"STANDIN-PLAN"
CACHE = b"STANDIN-CACHE"


ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1, "INT4": 0.5,
              "FP4": 0.5, "E8M0": None}  # fmt: skip
PRECISION_FLAGS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")
"""With a strongly typed network TensorRT 10 refuses these; TensorRT 11 no longer has them."""
TACTICS = {"Conv": "implicit_gemm", "ConvTranspose": "deconv", "Gemm": "gemm", "MatMul": "gemm"}
"""Operators whose tactic the inspector names after the arithmetic."""
REFITTABLE = {"REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"}
"""Flags that make an engine refittable; STRIP_PLAN alone means weights identical to those of the build."""
OWN_MEMORY = Path("/proc/self/mem")
"""Where Linux has it, memory that was given back to the system is an error in place of a crash."""


@dataclass
class Build:
    """One call of build_serialized_network, as tests want to ask about it."""

    version: str
    strongly_typed: bool
    network_flags: frozenset[str]
    flags: frozenset[str]
    """The BuilderFlags that were set when the build began; TF32 is set unless it was cleared."""
    parser_flags: frozenset[str]
    pool_limits: dict[str, int]
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]]
    profiling_verbosity: str
    options: dict[str, Any]
    """Every other option that was assigned: builder_optimization_level, hardware_compatibility_level, ... enums by name."""
    timing_cache: int | None
    """Entries of the timing cache before the build; None without one."""
    monitored: bool
    """Whether a progress monitor was called."""
    phases: list[tuple[str, str | None, int]] = field(default_factory=list)
    cancelled: bool = False
    onnx: bytes = b""
    reason: str | None = None
    """Why there is no plan; None where there is one."""
    plan: bytes | None = None


@dataclass
class StandIn:
    """What `install` returns: the modules, what was done with them, and the switches that make them fail."""

    version: str
    module: ModuleType
    runtime: ModuleType
    """The stand-in for cuda.bindings.runtime."""
    gpu: cuda_runtime.Gpu
    """Its pretended device: `capability`, `total_memory`, `count`, `fail`."""
    builds: list[Build] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    """(severity, text) of everything logged, whatever the logger kept."""
    executions: list[dict[str, Shape]] = field(default_factory=list)
    """Input shapes of every enqueued execution."""
    refits: list[list[str]] = field(default_factory=list)
    """The names of the weights of every refit that was done."""
    callback_errors: list[BaseException] = field(default_factory=list)
    """Raised by a monitor, logger or profiler; like NVIDIA's bindings, this one prints them and goes on."""
    unsupported: set[str] = field(default_factory=set)
    """ONNX operators that the parser refuses."""
    refuse_build: str | None = None
    """An error message that every build ends with."""
    refuse_execution: bool = False
    enum_properties: dict[str, Mapping[str, Any]] = field(default_factory=lambda: {"DataType.itemsize": ITEM_BYTES})

    def __post_init__(self) -> None:
        self.bindings = Bindings(listing(self.version), {each.of: each for each in BEHAVIOURS}, self)

    @property
    def strongly_typed_always(self) -> bool:
        return "FP16" not in self.bindings.listing.classes["BuilderFlag"]

    def live_allocations(self) -> dict[int, int]:
        """Address -> bytes of the device memory that nobody freed."""
        return self.gpu.live_allocations()

    def leaks(self) -> dict[str, list[int]]:
        """Allocations, streams and events that are still alive; empty when everything was given back."""
        alive = {
            "allocations": list(self.gpu.live_allocations()),
            "streams": self.gpu.live_streams(),
            "events": self.gpu.live_events(),
        }
        return {name: what for name, what in alive.items() if what}

    def log(self, logger: Any, severity: str, text: str) -> None:
        self.messages.append((severity, text))
        member = self.bindings.member("Severity", severity)
        if isinstance(logger, Logger):
            if member <= logger.min_severity:
                print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{severity[0]}] {text}")
        else:
            self.callback(lambda: logger._facade.log(member, text), "log")

    def callback(self, call: Callable[[], Any], name: str) -> Any:
        """A user's override, called the way the bindings do: an exception is printed, and the answer is None."""
        try:
            return call()
        except BaseException as error:
            self.callback_errors.append(error)
            print(f"[ERROR] Exception caught in {name}(): {error}", file=sys.stderr)
            return None


def install(monkeypatch: pytest.MonkeyPatch | None, version: str) -> StandIn:
    """Put the stand-in of TensorRT `version` ("10.14" or "11.4") and of CUDA's runtime where `import` finds them.

    With None instead of a monkeypatch they stay for good: for a process that is all the test's own.
    """
    gpu = cuda_runtime.Gpu()
    made: dict[str, ModuleType] = {"tensorrt": Module("tensorrt", __doc__), **cuda_runtime.modules(gpu)}
    world = StandIn(version, made["tensorrt"], made["cuda.bindings.runtime"], gpu)
    fill(made["tensorrt"], world)
    for name, module in made.items():
        if monkeypatch is None:
            sys.modules[name] = module
        else:
            monkeypatch.setitem(sys.modules, name, module)
    importlib.invalidate_caches()
    return world


class Module(ModuleType):
    """A module whose missing names say which version lacks them, and which takes no new ones."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module 'tensorrt' has no attribute {name!r} (stand-in of {vars(self).get('__version__')})")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__") and name not in vars(self):
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}, so it cannot be set")
        super().__setattr__(name, value)


def fill(module: ModuleType, world: StandIn) -> None:
    content = vars(module)
    known = world.bindings.listing
    content["__version__"], content["__spec__"] = known.version, ModuleSpec("tensorrt", None, is_package=True)
    content["__path__"] = []
    content.update((name, cls) for name, cls in world.bindings.classes.items() if name in known.classes)
    simulated: dict[str, Callable[..., Any]] = {
        "get_nv_onnx_parser_version": lambda: int(known.version.split(".")[0]) * 10000,
        "init_libnvinfer_plugins": lambda logger, namespace: True,
    }
    for name, signature in known.functions.items():
        content[name] = module_function(world, name, signature, simulated.get(name))


def module_function(world: StandIn, name: str, signature: str, does: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if does is None:
            raise NotImplementedError(f"tensorrt.{name} is not simulated")
        return does(*world.bindings.bind(name, (signature,), args, kwargs))

    call.__name__ = name
    return call


# ---- values


class Dims(Behaviour):
    """Not a tuple: it has a length and items, equals a tuple or a list, and cannot be compared with another Dims."""

    of = "Dims"

    def __init__(self, world: StandIn, shape: Iterable[int] = ()) -> None:
        super().__init__(world)
        self._dims = list(shape)
        if len(self._dims) > 8:
            raise ValueError(f"Input length {len(self._dims)}. Max expected length is 8")

    def __len__(self) -> int:
        return len(self._dims)

    def __getitem__(self, index: int | slice) -> int | Shape:
        return tuple(self._dims[index]) if isinstance(index, slice) else self._dims[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._dims[index] = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | tuple):
            raise TypeError("Dims.__eq__(): incompatible function arguments: a tuple or a list is expected")
        return self._dims == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self._dims))

    __str__ = __repr__


class Weights(Behaviour):
    """Refers to memory, and reads it as late as it can. Only one that was made from an array keeps that memory alive."""

    of = "Weights"

    def __init__(self, world: StandIn, source: Any, ptr: int = 0, count: int = 0) -> None:
        super().__init__(world)
        self._array = source if isinstance(source, np.ndarray) else None
        if self._array is None:
            if ptr < 0:
                raise TypeError(f"Weights(): {ptr} is no address")
            self.dtype, self.size, self._address = source, count, ptr
            return
        kind = next((kind.name for kind in KINDS.values() if kind.numpy == self._array.dtype.name != "bfloat16"), None)
        if kind is None:
            raise TypeError(f"Could not implicitly convert NumPy data type: {self._array.dtype} to TensorRT.")
        if not self._array.flags.c_contiguous:
            raise ValueError("Could not convert non-contiguous NumPy array to Weights. Please use numpy.ascontiguousarray()")
        self.dtype, self.size, self._address = world.bindings.member("DataType", kind), source.size, source.ctypes.data

    dtype: Any
    size: int

    @property
    def nbytes(self) -> int:
        return int(self._world.enum_properties["DataType.itemsize"][self.dtype.name] * self.size)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The memory itself, no copy; flat, as the weights do not know their shape."""
        kind = next(kind for kind in KINDS.values() if kind.name == self.dtype.name)
        if kind.name == "BF16":
            raise NotImplementedError("tensorrt.Weights.numpy is not simulated for bfloat16, which numpy lacks")
        if self._array is not None:
            return self._array.reshape(-1)
        if not self.size:
            return np.empty(0, kind.numpy)
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self._address)
        return np.ctypeslib.as_array(memory).view(kind.numpy)

    def __len__(self) -> int:
        return self.size

    def _bytes(self, device: bool) -> bytes:
        """What the memory holds now."""
        gpu = self._world.gpu
        if device:
            return bytes(gpu.view(self._address, self.nbytes))
        assert not gpu.inside(self._address), f"{self._address:#x} is device memory, and weights of the host were promised"
        if not OWN_MEMORY.exists():
            return ctypes.string_at(self._address, self.nbytes)
        try:
            with OWN_MEMORY.open("rb", buffering=0) as memory:
                memory.seek(self._address)
                found = memory.read(self.nbytes)
        except OSError:
            found = b""
        assert len(found) == self.nbytes, f"{self.nbytes} bytes of weights at {self._address:#x} were freed before the refit"
        return found


class Code:
    """nvonnxparser::ErrorCode, which the listings lack; it prints as its name."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return self.name


CODES = {"MODEL_DESERIALIZE_FAILED": 3, "INVALID_GRAPH": 5, "UNSUPPORTED_NODE": 8, "UNSUPPORTED_NODE_DATATYPE": 11}


class ParserError(Behaviour):
    of = "ParserError"

    def __init__(self, world: StandIn, code: str, text: str, node: int = -1, name: str = "", operator: str = "") -> None:
        super().__init__(world)
        self._code, self._text, self._node, self._name, self._operator = code, text, node, name, operator

    def code(self) -> Code:
        return Code(self._code, CODES[self._code])

    def desc(self) -> str:
        return self._text

    def file(self) -> str:
        return "stand-in"

    def line(self) -> int:
        return 0

    def func(self) -> str:
        return "parse"

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __repr__(self) -> str:
        text = f"(parse): {self._code}: {self._text}"
        if self._code == "MODEL_DESERIALIZE_FAILED":
            return text
        return f"In node {self._node} with name: {self._name} and operator: {self._operator} {text}"

    __str__ = __repr__


class Logger(Behaviour):
    """NVIDIA's own logger prints; a Python subclass that overrides `log` is never asked, only one of ILogger is."""

    of = "Logger"
    written: ClassVar = {"min_severity": "Severity"}
    min_severity: Any

    def __init__(self, world: StandIn, min_severity: Any) -> None:
        super().__init__(world)
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        self._world.log(self, severity.name, msg)


class ILogger(Callback):
    of = "ILogger"

    def log(self, severity: Any, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class IProgressMonitor(Callback):
    of = "IProgressMonitor"

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_start"')

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::step_complete"')

    def phase_finish(self, phase_name: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_finish"')


class IProfiler(Callback):
    of = "IProfiler"

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProfiler::report_layer_time"')


class Profiler(IProfiler):
    of = "Profiler"

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        print(f"{layer_name}: {ms}ms")


# ---- building


class ITensor(Behaviour):
    of = "ITensor"

    def __init__(self, network: INetworkDefinition, tensor: Tensor) -> None:
        super().__init__(network._world)
        self._network, self._tensor = network, tensor

    @property
    def name(self) -> str:
        return self._tensor.name

    @property
    def dtype(self) -> Any:
        return self._world.bindings.member("DataType", KINDS[self._tensor.kind].name)

    @property
    def shape(self) -> Dims:
        return Dims(self._world, self._tensor.shape)

    @property
    def location(self) -> Any:
        return self._world.bindings.member("TensorLocation", "DEVICE")

    @property
    def is_network_input(self) -> bool:
        return any(tensor is self._tensor for tensor in self._network._inputs())

    @property
    def is_network_output(self) -> bool:
        return any(tensor is self._tensor for tensor in self._network._outputs())

    is_shape_tensor = False
    is_execution_tensor = True
    written: ClassVar = dict.fromkeys(("name", "shape", "location"), NOT_SIMULATED)


class ILayer(Behaviour):
    of = "ILayer"
    written: ClassVar = {"name": "str", "metadata": "str"}
    name: str
    metadata: str

    def __init__(self, network: INetworkDefinition, node: Any) -> None:
        super().__init__(network._world)
        self._network, self._node = network, node
        self.name, self.metadata = node_name(node), f"[ONNX Layer: {node_name(node)}]"

    def _sources(self) -> list[str]:
        graph = self._network._parsed()
        return [name for name in self._node.input if name and name not in graph.constants]

    @property
    def num_inputs(self) -> int:
        return len(self._sources())

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._network, self._network._parsed().tensor(self._sources()[index]))

    def get_output(self, index: int) -> ITensor:
        return ITensor(self._network, self._network._parsed().tensor(self._node.output[index]))

    def get_output_type(self, index: int) -> Any:
        return self.get_output(index).dtype


class INetworkDefinition(Behaviour):
    of = "INetworkDefinition"
    written: ClassVar = {"name": "str"}
    name: str
    flags: int
    has_implicit_batch_dimension = False

    def __init__(self, builder: Builder, bits: int) -> None:
        super().__init__(builder._world)
        numbers = self._world.bindings.members("NetworkDefinitionCreationFlag")
        self.builder, self.name, self.flags = builder, "Unnamed Network 0", bits
        self._names = flags(bits, numbers, "create_network")
        self._typed = self._world.strongly_typed_always or "STRONGLY_TYPED" in self._names
        self._graph: Graph | None = None
        self._parser_flags: frozenset[str] = frozenset()

    builder: Builder

    def _parsed(self) -> Graph:
        if self._graph is None:
            raise NotImplementedError("a network that no parser filled is not simulated")
        return self._graph

    def _inputs(self) -> list[Tensor]:
        return self._graph.inputs if self._graph else []

    def _outputs(self) -> list[Tensor]:
        return self._graph.outputs if self._graph else []

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs())

    @property
    def num_outputs(self) -> int:
        return len(self._outputs())

    @property
    def num_layers(self) -> int:
        return len(self._graph.nodes) if self._graph else 0

    def get_input(self, index: int) -> ITensor | None:
        return ITensor(self, self._inputs()[index]) if 0 <= index < self.num_inputs else None

    def get_output(self, index: int) -> ITensor | None:
        return ITensor(self, self._outputs()[index]) if 0 <= index < self.num_outputs else None

    def get_layer(self, index: int) -> ILayer | None:
        return ILayer(self, self._parsed().nodes[index]) if 0 <= index < self.num_layers else None


class OnnxParser(Behaviour):
    of = "OnnxParser"
    written: ClassVar = {"flags": "int"}
    flags: int

    def __init__(self, world: StandIn, network: INetworkDefinition, logger: Any) -> None:
        super().__init__(world)
        self._network, self._logger, self._errors = network, logger, list[ParserError]()
        # what only a parser with this flag does differently is not simulated; NATIVE_INSTANCENORM is set from the start
        self.flags = 1 << world.bindings.members("OnnxParserFlag")["NATIVE_INSTANCENORM"]

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError | None:
        return self._errors[index] if 0 <= index < len(self._errors) else None

    def clear_errors(self) -> None:
        self._errors.clear()

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def set_builder_config(self, builder_config: IBuilderConfig) -> bool:
        return True

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    def supports_operator(self, op_name: str) -> bool:
        import onnx

        return op_name not in self._world.unsupported and bool(onnx.defs.has(op_name))

    def parse_from_file(self, model: str) -> bool:
        import onnx

        return self._parse(lambda: onnx.load(model))

    def parse(self, model: bytes, path: str | None) -> bool:
        import onnx

        def load() -> onnx.ModelProto:
            loaded = onnx.load_from_string(model)
            if path is not None:
                onnx.load_external_data_for_model(loaded, str(Path(path).parent))
            return loaded

        return self._parse(load)

    def _parse(self, load: Callable[[], onnx.ModelProto]) -> bool:
        self._errors.clear()
        try:
            graph = Graph(load())
            if not graph.nodes:
                raise ValueError("the graph has no node")
        except Exception as error:
            return self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to parse the ONNX model: {error}")
        if self._network._graph is not None:
            return self._fail("INVALID_GRAPH", "the network was filled before")
        for index, node in enumerate(graph.nodes):
            if node.domain not in ("", "ai.onnx") or not self.supports_operator(node.op_type):
                self._fail("UNSUPPORTED_NODE", f"No importer registered for op: {node.op_type}", index, node)
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.kind not in KINDS:
                self._fail("UNSUPPORTED_NODE_DATATYPE", f"tensor {tensor.name!r} has ONNX element type {tensor.kind}")
        if self._errors:
            return False
        self._network._graph = graph
        self._network._parser_flags = flags(self.flags, self._world.bindings.members("OnnxParserFlag"), "OnnxParser.flags")
        return True

    def _fail(self, code: str, text: str, index: int = -1, node: Any = None) -> bool:
        named = (node_name(node), node.op_type) if node is not None else ("", "")
        self._errors.append(ParserError(self._world, code, text, index, *named))
        self._world.log(self._logger, "ERROR", str(self._errors[-1]))
        return False


class IOptimizationProfile(Behaviour):
    of = "IOptimizationProfile"
    written: ClassVar = {"extra_memory_target": "float"}
    extra_memory_target = 1.0

    def __init__(self, world: StandIn) -> None:
        super().__init__(world)
        self._shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        if not len(min) == len(opt) == len(max):
            raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
        self._shapes[input] = (min, opt, max)

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(self._world, shape) for shape in self._shapes.get(input, ())]

    def __bool__(self) -> bool:
        return all(0 <= a <= b <= c for shapes in self._shapes.values() for a, b, c in zip(*shapes, strict=True))


class ITimingCache(Behaviour):
    of = "ITimingCache"

    def __init__(self, world: StandIn, data: bytes) -> None:
        super().__init__(world)
        content = json.loads(data.removeprefix(CACHE)) if data else {"version": world.bindings.listing.version, "layers": []}
        self._version, self._layers = content["version"], set(content["layers"])

    def serialize(self) -> Any:
        content = {"version": self._version, "layers": sorted(self._layers)}
        return self._world.bindings.memory(CACHE + json.dumps(content).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._version != self._version and not ignore_mismatch:
            return False
        self._layers |= input_cache._layers
        return True

    def reset(self) -> bool:
        self._layers.clear()
        return True


OPTIONS: dict[str, tuple[str, Any]] = {
    "DLA_core": ("int", -1),
    "avg_timing_iterations": ("int", 1),
    "builder_optimization_level": ("int", 3),
    "default_device_type": ("DeviceType", "GPU"),
    "engine_capability": ("EngineCapability", "STANDARD"),
    "hardware_compatibility_level": ("HardwareCompatibilityLevel", "NONE"),
    "l2_limit_for_tiling": ("int", -1),
    "max_aux_streams": ("int", -1),
    "max_num_tactics": ("int", -1),
    "profile_stream": ("int", 0),
    "profiling_verbosity": ("ProfilingVerbosity", "LAYER_NAMES_ONLY"),
    "runtime_platform": ("RuntimePlatform", "SAME_AS_BUILD"),
    "tiling_optimization_level": ("TilingOptimizationLevel", "NONE"),
}
"""Plain options of a builder configuration: type, and the value before anybody assigns one."""


class IBuilderConfig(Behaviour):
    of = "IBuilderConfig"
    written: ClassVar = {
        "flags": "int",
        "progress_monitor": "IProgressMonitor?",
        **{name: kind for name, (kind, _) in OPTIONS.items()},
    }
    flags: int
    progress_monitor: Any = None

    def __init__(self, world: StandIn) -> None:
        super().__init__(world)
        self.reset()

    @classmethod
    def simulates(cls, member: str) -> bool:
        return member in OPTIONS or super().simulates(member)

    def reset(self) -> None:
        bindings = self._world.bindings
        self.flags = 1 << bindings.members("BuilderFlag")["TF32"]
        self._pools: dict[str, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._invalid: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._features: dict[str, bool] = {}
        self._tactics: int = sum(1 << bit for bit in bindings.members("TacticSource").values())
        for name, (kind, value) in OPTIONS.items():
            vars(self)[name] = bindings.member(kind, value) if isinstance(value, str) else value
        self._assigned: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in OPTIONS:
            self._assigned[name] = value if isinstance(value, int) else value.name

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        if pool_size < 0:
            raise TypeError(f"set_memory_pool_limit(): {pool_size} is negative")
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        unset: int = self._world.gpu.total_memory if pool.name == "WORKSPACE" else 0
        return self._pools.get(pool.name, unset)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            self._invalid.append(profile)
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if serialized_timing_cache and not serialized_timing_cache.startswith(CACHE):
            return None
        return ITimingCache(self._world, serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._version != self._world.bindings.listing.version and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._features[feature.name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return self._features.get(feature.name, False)

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        flags(tactic_sources, self._world.bindings.members("TacticSource"), "set_tactic_sources")
        self._tactics = tactic_sources
        return True

    def get_tactic_sources(self) -> int:
        return self._tactics


class Cancelled(Exception):
    """The monitor answered False."""


class Builder(Behaviour):
    of = "Builder"
    written: ClassVar = {"max_threads": "int"}
    max_threads = 1
    num_DLA_cores = 0  # noqa: N815
    max_DLA_batch_size = 1  # noqa: N815
    platform_has_fast_fp16 = True
    platform_has_fast_int8 = True
    platform_has_tf32 = True
    logger: Any

    def __init__(self, world: StandIn, logger: Any) -> None:
        super().__init__(world)
        self.logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(self, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._world)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile(self._world)

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return self._objection(network, config) is None

    def reset(self) -> None:
        return None

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        world = self._world
        build = Build(
            version=world.bindings.listing.version,
            strongly_typed=network._typed,
            network_flags=network._names,
            flags=flags(config.flags, world.bindings.members("BuilderFlag"), "IBuilderConfig.flags"),
            parser_flags=network._parser_flags,
            pool_limits=dict(config._pools),
            profiles=[dict(profile._shapes) for profile in config._profiles],
            profiling_verbosity=vars(config)["profiling_verbosity"].name,
            options={name: value for name, value in config._assigned.items() if name != "profiling_verbosity"}
            | ({"preview_features": dict(config._features)} if config._features else {}),
            timing_cache=None if config._cache is None else len(config._cache._layers),
            monitored=False,
        )
        world.builds.append(build)
        world.log(self.logger, "INFO", f"Building an engine with the stand-in of TensorRT {build.version}")
        build.reason = self._objection(network, config)
        if build.reason is None:
            try:
                self._phases(network, config, build)
            except Cancelled as error:
                build.cancelled, build.reason = True, str(error)
        if build.reason is not None:
            world.log(self.logger, "ERROR", build.reason)
            return None
        build.onnx = network._parsed().model.SerializeToString()
        build.plan = write_plan(build, world, network.name)
        world.log(self.logger, "VERBOSE", f"Engine of {len(build.plan)} bytes")
        return world.bindings.memory(build.plan)

    def build_engine_with_config(self, network: INetworkDefinition, config: IBuilderConfig) -> ICudaEngine | None:
        plan = self.build_serialized_network(network, config)
        return None if plan is None else ICudaEngine(self._world, self.logger, bytes(plan))

    def _objection(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        """Why TensorRT would build nothing."""
        if self._world.refuse_build is not None:
            return str(self._world.refuse_build)
        if network._graph is None:
            return "Network must have at least one output"
        if config.flags & flag_bit(self._world, "REFIT_INDIVIDUAL"):
            raise NotImplementedError("tensorrt.BuilderFlag.REFIT_INDIVIDUAL is not simulated")
        precision = [name for name in PRECISION_FLAGS if config.flags & flag_bit(self._world, name)]
        if network._typed and precision:
            return f"a strongly typed network takes no precision flag, and {', '.join(precision)} is set"
        if config._invalid:
            return "an optimization profile does not satisfy min <= opt <= max"
        open_inputs = {tensor.name: tensor.shape for tensor in network._inputs() if -1 in tensor.shape}
        if open_inputs and not config._profiles:
            return (
                f"Network has dynamic or shape inputs, but no optimization profile has been defined: {', '.join(open_inputs)}"
            )
        shapes = {tensor.name: tensor.shape for tensor in network._inputs()}
        for index, profile in enumerate(config._profiles):
            if missing := open_inputs.keys() - profile._shapes.keys():
                return f"optimization profile {index} has no shape for the dynamic input {', '.join(sorted(missing))}"
            for name, bounds in profile._shapes.items():
                if name not in shapes:
                    return f"optimization profile {index} names {name!r}, which is no input"
                for bound in bounds:
                    if len(bound) != len(shapes[name]) or any(
                        d not in (-1, b) for d, b in zip(shapes[name], bound, strict=True)
                    ):
                        return f"optimization profile {index}: {name} is {shapes[name]} in the network, {bound} in the profile"
        return None

    def _phases(self, network: INetworkDefinition, config: IBuilderConfig, build: Build) -> None:
        """The nested phases of a build; those of the tactics run on another thread, as TensorRT's may."""
        layers = network._parsed().layers()
        report = Report(self._world, config.progress_monitor, build)
        root = "Building engine"
        with report.phase(root, None, 3):
            with report.phase("Optimizing the graph", root, 2):
                report.step("Optimizing the graph", 0)
                report.step("Optimizing the graph", 1)
            report.step(root, 0)
            report.on_thread(lambda: self._tactics(report, root, len(layers)))
            report.step(root, 1)
            with report.phase("Serializing the engine", root, 1):
                report.step("Serializing the engine", 0)
            report.step(root, 2)
        if config._cache is not None and not config.flags & flag_bit(self._world, "DISABLE_TIMING_CACHE"):
            config._cache._layers |= {f"{layer.operator}:{layer.name}" for layer in layers}

    @staticmethod
    def _tactics(report: Report, root: str, count: int) -> None:
        with report.phase("Timing tactics", root, max(count, 1)):
            for index in range(max(count, 1)):
                report.step("Timing tactics", index)


class Report:
    """Calls a progress monitor by position, as NVIDIA's code does; a False, a None or an exception cancels."""

    def __init__(self, world: StandIn, monitor: IProgressMonitor | None, build: Build) -> None:
        self.world, self.monitor, self.build = world, monitor, build

    def phase(self, name: str, parent: str | None, steps: int) -> Phase:
        return Phase(self, name, parent, steps)

    def call(self, method: str, *args: Any) -> Any:
        if self.monitor is None:
            return True
        self.build.monitored = True
        user = self.monitor._facade
        return self.world.callback(lambda: getattr(user, method)(*args), method)

    def step(self, phase: str, index: int) -> None:
        if not self.call("step_complete", phase, index):
            raise Cancelled(f"the progress monitor cancelled the build in {phase!r}")

    def on_thread(self, work: Callable[[], None]) -> None:
        raised: list[Cancelled] = []

        def run() -> None:
            try:
                work()
            except Cancelled as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]


@dataclass
class Phase:
    """Started on entry, finished on exit, also after a cancellation."""

    report: Report
    name: str
    parent: str | None
    steps: int

    def __enter__(self) -> None:
        self.report.build.phases.append((self.name, self.parent, self.steps))
        self.report.call("phase_start", self.name, self.parent, self.steps)

    def __exit__(self, *_: object) -> None:
        self.report.call("phase_finish", self.name)


def flag_bit(world: StandIn, name: str) -> int:
    """The bit of a BuilderFlag, 0 where this version has no such flag."""
    number = world.bindings.members("BuilderFlag").get(name)
    return 0 if number is None else 1 << number


# ---- plans and running


def write_plan(build: Build, world: StandIn, name: str) -> bytes:
    onnx = stripped(build.onnx) if "STRIP_PLAN" in build.flags else build.onnx
    header = {
        "version": build.version,
        "name": name,
        "profiles": build.profiles,
        "profiling_verbosity": build.profiling_verbosity,
        "flags": sorted(build.flags),
        "strongly_typed": build.strongly_typed,
        "capability": world.gpu.capability,
        "hardware_compatibility_level": build.options.get("hardware_compatibility_level", "NONE"),
        "crc": zlib.crc32(onnx),
    }
    text = json.dumps(header).encode()
    return PLAN + len(text).to_bytes(8, "little") + text + onnx


def read_plan(plan: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the ONNX bytes; None for anything that is no whole plan of this stand-in."""
    start = len(PLAN) + 8
    if not plan.startswith(PLAN) or len(plan) < start:
        return None
    end = start + int.from_bytes(plan[len(PLAN) : start], "little")
    try:
        header: dict[str, Any] = json.loads(plan[start:end])
    except ValueError:
        return None
    return (header, plan[end:]) if header["crc"] == zlib.crc32(plan[end:]) else None


class Runtime(Behaviour):
    of = "Runtime"
    written: ClassVar = {
        "engine_host_code_allowed": "bool",
        "max_threads": "int",
        "DLA_core": "int",
        "temporary_directory": "str",
    }
    engine_host_code_allowed = False
    max_threads = 1
    DLA_core = -1
    num_DLA_cores = 0  # noqa: N815
    temporary_directory = ""
    logger: Any

    def __init__(self, world: StandIn, logger: Any) -> None:
        super().__init__(world)
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        reason = self._objection(serialized_engine)
        if reason is not None:
            self._world.log(self.logger, "ERROR", reason)
            return None
        return ICudaEngine(self._world, self.logger, serialized_engine)

    def _objection(self, plan: bytes) -> str | None:
        read = read_plan(plan)
        if read is None:
            return "Serialization assertion failed: these bytes are no plan"
        header, running = read[0], self._world.bindings.listing.version
        if "VERSION_COMPATIBLE" in header["flags"]:
            if not self.engine_host_code_allowed and "EXCLUDE_LEAN_RUNTIME" not in header["flags"]:
                return "the plan holds host code; set engine_host_code_allowed to load it"
        elif header["version"] != running:
            return f"the plan was built by TensorRT {header['version']}, this is {running}"
        built, here = tuple(header["capability"]), self._world.gpu.capability
        if built != here and not (header["hardware_compatibility_level"] == "AMPERE_PLUS" and min(built, here) >= (8, 0)):
            return f"the plan was built for compute capability {built}, this device has {here}"
        return None


class ISerializationConfig(Behaviour):
    of = "ISerializationConfig"
    written: ClassVar = {"flags": "int"}
    flags = 0

    def set_flag(self, flag: Any) -> bool:
        self.flags |= 1 << int(flag)
        return True

    def clear_flag(self, flag: Any) -> bool:
        self.flags &= ~(1 << int(flag))
        return True

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)


class ICudaEngine(Behaviour):
    of = "ICudaEngine"
    name: str
    num_aux_streams = 0
    has_implicit_batch_dimension = False

    def __init__(self, world: StandIn, logger: Any, plan: bytes) -> None:
        import onnx

        super().__init__(world)
        read = read_plan(plan)
        assert read is not None
        self._header, self._onnx = read
        self._logger, self._plan, self._graph = logger, plan, Graph(onnx.load_from_string(self._onnx))
        self._layers = self._graph.layers()
        self._tensors = {tensor.name: tensor for tensor in (*self._graph.inputs, *self._graph.outputs)}
        self._inputs = {tensor.name for tensor in self._graph.inputs}
        static = {tensor.name: [list(tensor.shape)] * 3 for tensor in self._graph.inputs}
        self._profiles = [{**static, **profile} for profile in self._header["profiles"]] or [static]
        self._program: Program | None = None
        self._refittable = {}
        if self.refittable:
            held = refittable(self._graph.model)
            self._refittable = {name: (KINDS[tensor.data_type].name, product(tensor.dims)) for name, tensor in held.items()}
        self._missing = set(self._refittable) if "STRIP_PLAN" in self._header["flags"] else set[str]()
        self.name = self._header["name"]

    def _tensor(self, name: str) -> Tensor:
        assert name in self._tensors, f"the engine has no tensor {name!r}; it has {', '.join(self._tensors)}"
        return self._tensors[name]

    def _run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        self._program = self._program or Program(self._onnx, self._graph)
        return self._program.run(feeds)

    def _refit(self, data: Mapping[str, bytes]) -> None:
        import onnx

        self._onnx = refitted(self._onnx, data)
        self._graph, self._program = Graph(onnx.load_from_string(self._onnx)), None
        self._missing -= data.keys()

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def refittable(self) -> bool:
        return not REFITTABLE.isdisjoint(self._header["flags"])

    @property
    def profiling_verbosity(self) -> Any:
        return self._world.bindings.member("ProfilingVerbosity", self._header["profiling_verbosity"])

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._world.bindings.member("HardwareCompatibilityLevel", self._header["hardware_compatibility_level"])

    @property
    def engine_capability(self) -> Any:
        return self._world.bindings.member("EngineCapability", "STANDARD")

    @property
    def device_memory_size_v2(self) -> int:
        """Some number of bytes: twice the largest profile's inputs and outputs."""
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self._profiles))))

    @property
    def device_memory_size(self) -> int:
        return self.device_memory_size_v2

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 2 * sum(product(bounds[2]) * 4 for bounds in self._profiles[profile_index].values())

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.get_device_memory_size_for_profile_v2(profile_index)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = "INPUT" if name in self._inputs else "OUTPUT" if name in self._tensors else "NONE"
        return self._world.bindings.member("TensorIOMode", mode)

    def get_tensor_dtype(self, name: str) -> Any:
        return self._world.bindings.member("DataType", KINDS[self._tensor(name).kind].name)

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._world, self._tensor(name).shape)

    def get_tensor_location(self, name: str) -> Any:
        self._tensor(name)
        return self._world.bindings.member("TensorLocation", "DEVICE")

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        self._tensor(name)
        return self._world.bindings.member("TensorFormat", "LINEAR")

    def get_tensor_format_desc(self, name: str, profile_index: int = 0) -> str:
        return f"Row major linear {KINDS[self._tensor(name).kind].ten} format (kLINEAR)"

    def get_tensor_bytes_per_component(self, name: str, profile_index: int = 0) -> int:
        self._tensor(name)
        return -1

    def get_tensor_components_per_element(self, name: str, profile_index: int = 0) -> int:
        self._tensor(name)
        return -1

    def get_tensor_vectorized_dim(self, name: str, profile_index: int = 0) -> int:
        self._tensor(name)
        return -1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert name in self._inputs, f"{name!r} is no input: only inputs have profiles"
        assert 0 <= profile_index < len(self._profiles), f"the engine has no optimization profile {profile_index}"
        return [Dims(self._world, shape) for shape in self._profiles[profile_index][name]]

    def is_shape_inference_io(self, name: str) -> bool:
        self._tensor(name)
        return False

    def is_debug_tensor(self, name: str) -> bool:
        return False

    def get_engine_stat(self, stat: Any) -> int:
        """Bytes of all weights, or of those that were stripped: -1 where none were, as NVIDIA documents it."""
        if stat.name == "TOTAL_WEIGHTS_SIZE":
            stored = self._graph.model.graph.initializer
            return sum(product(t.dims) * KINDS[t.data_type].itemsize for t in stored if t.data_type in KINDS)
        if "STRIP_PLAN" not in self._header["flags"]:
            return -1
        return sum(int(ITEM_BYTES[kind] or 0) * count for kind, count in self._refittable.values())

    def serialize(self) -> Any:
        return self._world.bindings.memory(self._plan)

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig(self._world)

    def serialize_with_config(self, arg0: ISerializationConfig) -> Any:
        if self._refittable:
            raise NotImplementedError("tensorrt.ICudaEngine.serialize_with_config is not simulated for a refittable engine")
        return self.serialize()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        if not hasattr(strategy, "name"):
            raise NotImplementedError("tensorrt.ICudaEngine.create_execution_context(runtime_config) is not simulated")
        return IExecutionContext(self)


class Refitter(Behaviour):
    """Weights go by the names of their ONNX initializers, or of what a Constant makes; none has a layer and a role."""

    of = "Refitter"
    written: ClassVar = {"max_threads": "int", "weights_validation": "bool"}
    max_threads = 1
    weights_validation = True
    logger: Any

    def __init__(self, world: StandIn, engine: ICudaEngine, logger: Any) -> None:
        super().__init__(world)
        self._engine, self.logger = engine, logger
        self._given: dict[str, tuple[Weights, Any]] = {}
        if not engine.refittable:
            self._error("the engine is not refittable: it was built without REFIT, REFIT_IDENTICAL and STRIP_PLAN")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _error(self, text: str) -> bool:
        self._world.log(self.logger, "ERROR", text)
        return False

    def _known(self, name: str) -> bool:
        return name in self._engine._refittable or self._error(f"there are no refittable weights named {name!r}")

    def get_all_weights(self) -> list[str]:
        return list(self._engine._refittable)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine._refittable if name in self._engine._missing and name not in self._given]

    def get_missing(self) -> tuple[list[str], list[Any]]:
        if self.get_missing_weights():
            raise NotImplementedError("tensorrt.Refitter.get_missing is not simulated: the listings lack WeightsRole")
        return [], []

    def set_named_weights(self, name: str, weights: Weights, location: Any = None) -> bool:
        if not self._known(name):
            return False
        kind, count = self._engine._refittable[name]
        if (weights.dtype.name, weights.size) != (kind, count):
            return self._error(f"{name!r} has {count} weights of {kind}, {weights.size} of {weights.dtype.name} were given")
        self._given[name] = weights, location or self._world.bindings.member("TensorLocation", "HOST")
        return True

    def unset_named_weights(self, weights_name: str) -> bool:
        return self._given.pop(weights_name, None) is not None

    def get_named_weights(self, weights_name: str) -> Weights:
        """Empty where none were set."""
        if weights_name in self._given:
            return self._given[weights_name][0]
        return Weights(self._world, self._world.bindings.member("DataType", "FLOAT"))

    def get_weights_location(self, weights_name: str) -> Any:
        host = self._world.bindings.member("TensorLocation", "HOST")
        return self._given[weights_name][1] if weights_name in self._given else host

    def get_weights_prototype(self, weights_name: str) -> Weights:
        """Type and count without values; empty for an unknown name."""
        kind, count = self._engine._refittable[weights_name] if self._known(weights_name) else ("FLOAT", 0)
        return Weights(self._world, self._world.bindings.member("DataType", kind), 0, count)

    def refit_cuda_engine(self) -> bool:
        if missing := self.get_missing_weights():
            return self._error(f"{len(missing)} weights are missing, {missing[0]!r} among them")
        data = {name: weights._bytes(place.name == "DEVICE") for name, (weights, place) in self._given.items()}
        self._engine._refit(data)
        self._world.refits.append(list(data))
        return True


class EngineInspector(Behaviour):
    of = "EngineInspector"
    written: ClassVar = {"execution_context": "IExecutionContext?"}
    execution_context: Any = None

    def __init__(self, engine: ICudaEngine) -> None:
        super().__init__(engine._world)
        self._engine = engine
        self._ten = not self._world.strongly_typed_always

    def get_engine_information(self, format: Any) -> str:
        layers = [self._layer(layer) for layer in self._layers()]
        if format.name != "JSON":
            return "Layers:\n" + "\n".join(self._line(layer) for layer in layers)
        if self._ten:
            return json.dumps({"Layers": layers, "Bindings": list(self._engine._tensors)}, indent=1)
        tensors = [self._binding(tensor) for tensor in self._engine._tensors.values()]
        return json.dumps({"Layers": layers, "I/O Tensors": tensors}, indent=1)

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        layer = self._layer(self._layers()[layer_index])
        return json.dumps(layer, indent=1) if format.name == "JSON" else self._line(layer)

    def _layers(self) -> list[Layer]:
        """With a context whose shapes are set, open sizes are those of its shapes."""
        context = self.execution_context
        return self._engine._layers if context is None or context._missing() else context._fixed().layers()

    @staticmethod
    def _line(layer: Any) -> str:
        return layer if isinstance(layer, str) else f"Name: {layer['Name']}, LayerType: {layer['LayerType']}"

    def _layer(self, layer: Layer) -> str | dict[str, Any]:
        if self._engine._header["profiling_verbosity"] != "DETAILED":
            return layer.name
        return {
            "Name": layer.name,
            "LayerType": "CaskConvolution" if layer.operator == "Conv" else layer.operator,
            "Inputs": [self._tensor(tensor) for tensor in layer.inputs],
            "Outputs": [self._tensor(tensor) for tensor in layer.outputs],
            **layer.parameters,
            "TacticName": self._tactic(layer),
            "Metadata": "",
        }

    def _tactic(self, layer: Layer) -> str:
        if layer.operator not in TACTICS or not layer.outputs:
            return ""
        kind = KINDS[layer.outputs[0].kind].name if layer.outputs[0].kind in KINDS else "FLOAT"
        full = "tf32f32" if "TF32" in self._engine._header["flags"] else "f32f32"
        return f"standin_{ {'FLOAT': full, 'HALF': 'f16f16', 'BF16': 'bf16bf16'}.get(kind, 'i8i8') }_{TACTICS[layer.operator]}"

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        kind = KINDS[tensor.kind] if tensor.kind in KINDS else KINDS[1]
        place = {"Name": tensor.name, "Location": "Device", "Dimensions": list(tensor.shape)}
        if self._ten:
            return {**place, "Format/Datatype": f"Row major linear {kind.ten}"}
        return {**place, "Format": "Row major linear", "DataType": kind.eleven}

    def _binding(self, tensor: Tensor) -> dict[str, Any]:
        kind, engine = KINDS[tensor.kind], self._engine
        layout = {"Format": f"Row major linear {kind.ten} format (kLINEAR)"}
        profiles = [
            dict(zip(("MinShape", "OptShape", "MaxShape"), map(list, profile[tensor.name]), strict=True)) | layout
            if tensor.name in engine._inputs
            else layout
            for profile in engine._profiles
        ]
        return {
            "Name": tensor.name,
            "IOMode": "Input" if tensor.name in engine._inputs else "Output",
            "DataType": kind.eleven,
            "Dimensions": list(tensor.shape),
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": profiles,
        }


class IExecutionContext(Behaviour):
    of = "IExecutionContext"
    written: ClassVar = {
        "name": "str", "profiler": "IProfiler?", "enqueue_emits_profile": "bool", "debug_sync": "bool",
        "nvtx_verbosity": "ProfilingVerbosity", "persistent_cache_limit": "int",
    }  # fmt: skip
    name = ""
    profiler: Any = None
    enqueue_emits_profile = True
    debug_sync = False
    nvtx_verbosity: Any
    persistent_cache_limit = 0
    active_optimization_profile: int
    engine: ICudaEngine

    def __init__(self, engine: ICudaEngine) -> None:
        super().__init__(engine._world)
        self.engine, self.active_optimization_profile = engine, 0
        self.nvtx_verbosity = engine.profiling_verbosity
        self._shapes = {t.name: t.shape for t in engine._graph.inputs if -1 not in t.shape}
        self._refused: set[str] = set()
        self._addresses: dict[str, int] = {}
        self._times: list[tuple[str, float]] = []
        self._inferred: dict[tuple[tuple[str, Shape], ...], Graph] = {}

    def _error(self, text: str) -> bool:
        self._world.log(self.engine._logger, "ERROR", text)
        return False

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        engine = self.engine
        if name not in engine._inputs:
            return self._error(f"set_input_shape: {name!r} is no input")
        self._refused.add(name)
        bounds = engine._profiles[self.active_optimization_profile][name]
        if len(shape) != len(bounds[0]):
            return self._error(f"set_input_shape: {name} has {len(bounds[0])} dimensions, {shape} has {len(shape)}")
        if not all(low <= size <= high for low, size, high in zip(bounds[0], shape, bounds[2], strict=True)):
            return self._error(f"set_input_shape: {name} is {shape}, its profile is from {bounds[0]} to {bounds[2]}")
        self._refused.discard(name)
        self._shapes[name] = shape
        return True

    def _shape(self, name: str) -> Shape:
        if name in self.engine._inputs:
            return self._shapes.get(name, self.engine._tensor(name).shape)
        if self._missing():
            return self.engine._tensor(name).shape
        return self._fixed().tensor(name).shape

    def _fixed(self) -> Graph:
        """The graph at the shapes that are set."""
        key = tuple(sorted(self._shapes.items()))
        if key not in self._inferred:
            self._inferred[key] = self.engine._graph.fixed(self._shapes)
        return self._inferred[key]

    def _missing(self) -> list[str]:
        return [tensor.name for tensor in self.engine._graph.inputs if tensor.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        self.engine._tensor(name)
        return Dims(self._world, self._shape(name))

    def get_tensor_strides(self, name: str) -> Dims:
        shape = self._shape(name)
        return Dims(self._world, tuple(product(shape[axis + 1 :]) for axis in range(len(shape))))

    def get_max_output_size(self, name: str) -> int:
        """Bytes of an output at its largest: at the profile's largest shapes."""
        largest = {n: tuple(b[2]) for n, b in self.engine._profiles[self.active_optimization_profile].items()}
        tensor = self.engine._graph.fixed(largest).tensor(name)
        return product(tensor.shape) * dtype_of(tensor).itemsize

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._missing()

    def infer_shapes(self) -> list[str]:
        return self._missing()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._tensors:
            return self._error(f"set_tensor_address: the engine has no tensor {name!r}")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self.engine._profiles):
            return self._error(f"the engine has no optimization profile {profile_index}")
        self._world.gpu.enqueue(stream_handle, lambda: None)
        self.active_optimization_profile = profile_index
        self._shapes = {t.name: t.shape for t in self.engine._graph.inputs if -1 not in t.shape}
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.device_memory_size_v2

    def execute_v2(self, bindings: Sequence[int]) -> bool:
        self._addresses = dict(zip(self.engine._tensors, bindings, strict=True))
        if not self.execute_async_v3(0):
            return False
        self._world.gpu.drain(0)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        world, engine = self._world, self.engine
        if world.refuse_execution:
            return self._error("the stand-in was told to refuse")
        if engine._missing:
            return self._error(f"{len(engine._missing)} weights were stripped from the plan: refit the engine first")
        if self._refused or self._missing():
            return self._error(f"no valid shape was set for {', '.join(sorted(self._refused) or self._missing())}")
        if missing := [name for name in engine._tensors if not self._addresses.get(name)]:
            return self._error(f"no address was set for {', '.join(missing)}")
        places = {}
        for name, tensor in engine._tensors.items():
            shape = self._shape(name)
            if -1 in shape:
                raise NotImplementedError(f"the shape {shape} of {name} depends on data: not simulated")
            places[name] = (self._addresses[name], shape, dtype_of(tensor))
            world.gpu.view(self._addresses[name], product(shape) * dtype_of(tensor).itemsize)
        engine._program = engine._program or Program(engine._onnx, engine._graph)
        world.executions.append({name: self._shapes[name] for name in engine._tensors if name in engine._inputs})
        world.gpu.enqueue(stream_handle, lambda: self._execute(places))
        if self.profiler is not None and self.enqueue_emits_profile:
            world.gpu.drain(stream_handle)
            self.report_to_profiler()
        return True

    def _execute(self, places: Mapping[str, tuple[int, Shape, np.dtype[Any]]]) -> None:
        started, gpu = time.perf_counter(), self._world.gpu
        feeds = {}
        for name, (address, shape, kind) in places.items():
            if name in self.engine._inputs:
                data = gpu.view(address, product(shape) * kind.itemsize).tobytes()
                feeds[name] = np.frombuffer(data, kind).reshape(shape)
        for name, array in self.engine._run(feeds).items():
            address, shape, kind = places[name]
            assert array.shape == shape, f"{name} came out as {array.shape}, {shape} was inferred"
            gpu.view(address, array.nbytes)[:] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
            assert array.dtype == kind, f"{name} came out as {array.dtype}, {kind} was expected"
        share = (time.perf_counter() - started) * 1e3 / max(len(self.engine._layers), 1)
        self._times = [(layer.name, share) for layer in self.engine._layers]

    def report_to_profiler(self) -> bool:
        if self.profiler is None:
            return False
        user = self.profiler._facade
        for name, milliseconds in self._times:
            self._world.callback(partial(user.report_layer_time, name, milliseconds), "report_layer_time")
        return True


BEHAVIOURS: tuple[type[Behaviour], ...] = (
    Builder, Dims, EngineInspector, IBuilderConfig, ICudaEngine, IExecutionContext, ILayer, ILogger, INetworkDefinition,
    IOptimizationProfile, IProfiler, IProgressMonitor, ISerializationConfig, ITensor, ITimingCache, Logger, OnnxParser,
    ParserError, Profiler, Refitter, Runtime, Weights,
)  # fmt: skip

"""A stand-in for `cuda.bindings.runtime`: device memory is host memory whose every use is checked.

Work on a stream waits until something synchronises it, so that reading a result too early reads what was there before.
Names, parameter names and numbers are held against the real module by a test, where that is installed.
"""
# ruff: noqa: N801, N802, N803, N815

from __future__ import annotations

import ctypes
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

PARAMETERS: dict[str, tuple[str, ...]] = {
    "cudaDeviceSynchronize": (),
    "cudaDriverGetVersion": (),
    "cudaEventCreate": (),
    "cudaEventCreateWithFlags": ("flags",),
    "cudaEventDestroy": ("event",),
    "cudaEventElapsedTime": ("start", "end"),
    "cudaEventRecord": ("event", "stream"),
    "cudaEventSynchronize": ("event",),
    "cudaFree": ("devPtr",),
    "cudaGetDevice": (),
    "cudaGetDeviceCount": (),
    "cudaGetDeviceProperties": ("device",),
    "cudaGetErrorName": ("error",),
    "cudaGetErrorString": ("error",),
    "cudaMalloc": ("size",),
    "cudaMemGetInfo": (),
    "cudaMemcpy": ("dst", "src", "count", "kind"),
    "cudaMemcpyAsync": ("dst", "src", "count", "kind", "stream"),
    "cudaMemset": ("devPtr", "value", "count"),
    "cudaRuntimeGetVersion": (),
    "cudaSetDevice": ("device",),
    "cudaStreamCreate": (),
    "cudaStreamCreateWithFlags": ("flags",),
    "cudaStreamDestroy": ("stream",),
    "cudaStreamSynchronize": ("stream",),
}
"""Every simulated function and its parameters, in order; the real module calls them the same."""
RETURNS_NOTHING = {"cudaDeviceSynchronize", "cudaEventDestroy", "cudaEventRecord", "cudaEventSynchronize", "cudaFree",
                   "cudaMemcpy", "cudaMemcpyAsync", "cudaMemset", "cudaSetDevice", "cudaStreamDestroy",
                   "cudaStreamSynchronize"}  # fmt: skip
"""These return (status,); the others (status, value, ...), with None for every value when they fail."""
POISON = 0xCD
"""Fresh device memory holds this, not zeros."""
CUDA_VERSION = 13000


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


MESSAGES = {
    cudaError_t.cudaSuccess: b"no error",
    cudaError_t.cudaErrorInvalidValue: b"invalid argument",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    cudaError_t.cudaErrorInvalidDevice: b"invalid device ordinal",
    cudaError_t.cudaErrorInvalidResourceHandle: b"invalid resource handle",
    cudaError_t.cudaErrorNotReady: b"device not ready",
}


class Handle:
    """A stream or an event: int(handle) is what other libraries take. Older releases have no __index__, nor has this."""

    __slots__ = ("_value",)

    def __init__(self, init_value: int = 0) -> None:
        self._value = init_value

    def __int__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and type(self) is type(other) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


class cudaStream_t(Handle):
    __slots__ = ()


class cudaEvent_t(Handle):
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class cudaDeviceProp:
    """The few fields that are simulated; any other raises AttributeError."""

    name: bytes
    major: int
    minor: int
    totalGlobalMem: int
    multiProcessorCount: int


class Failed(Exception):
    """A function's status when it is not cudaSuccess."""

    def __init__(self, status: cudaError_t) -> None:
        self.status = status


@dataclass
class Gpu:
    """One pretended device, and what was done with it. Change its fields, or `fail`, to pretend another."""

    name: str = "Stand-in GPU"
    capability: tuple[int, int] = (8, 6)
    total_memory: int = 8 << 30
    count: int = 1
    fail: dict[str, str] = field(default_factory=dict)
    """Function -> name of the cudaError_t that it returns from now on."""
    calls: list[str] = field(default_factory=list)
    _device: int = 0
    _next: int = 0x5000
    _blocks: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    _freed: set[int] = field(default_factory=set)
    _streams: dict[int, list[Callable[[], None]]] = field(default_factory=lambda: {0: []})
    _nonblocking: set[int] = field(default_factory=set)
    _events: dict[int, tuple[int, float | None] | None] = field(default_factory=dict)

    # ---- what tests and the stand-in of TensorRT ask

    def live_allocations(self) -> dict[int, int]:
        """Address -> bytes of what was not freed."""
        return {address: block.nbytes for address, block in self._blocks.items()}

    def live_streams(self) -> list[int]:
        return [stream for stream in self._streams if stream]

    def live_events(self) -> list[int]:
        return list(self._events)

    def inside(self, address: int) -> bool:
        return any(start <= address < start + block.nbytes for start, block in self._blocks.items())

    def view(self, address: int, count: int) -> np.ndarray[Any, Any]:
        """The bytes of device memory from `address`; AssertionError unless one allocation holds them all."""
        for start, block in self._blocks.items():
            if start <= address < start + block.nbytes:
                assert address + count <= start + block.nbytes, (
                    f"{count} bytes from {address:#x} run out of an allocation of {block.nbytes} bytes"
                )
                return block[address - start : address - start + count]
        freed = " (it was freed)" if address in self._freed else ""
        raise AssertionError(f"{address:#x} is no device memory{freed}")

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self._streams, f"stream {stream:#x} does not exist or was destroyed"
        self._streams[stream].append(work)

    def drain(self, stream: int | None = None) -> None:
        """Do what waits on one stream; on stream 0, or None, what waits on all (0 leaves the non-blocking ones)."""
        streams = [s for s in self._streams if stream is None or (stream == 0 and s not in self._nonblocking) or s == stream]
        for each in streams:
            waiting, self._streams[each] = self._streams[each], []
            for work in waiting:
                work()

    # ---- the functions

    def cudaGetDeviceCount(self) -> int:
        if not self.count:
            raise Failed(cudaError_t.cudaErrorNoDevice)
        return self.count

    def cudaGetDevice(self) -> int:
        return self._device

    def cudaSetDevice(self, device: int) -> None:
        if not 0 <= device < self.count:
            raise Failed(cudaError_t.cudaErrorInvalidDevice)
        self._device = device

    def cudaGetDeviceProperties(self, device: int) -> cudaDeviceProp:
        if not 0 <= device < self.count:
            raise Failed(cudaError_t.cudaErrorInvalidDevice)
        return cudaDeviceProp(self.name.encode(), *self.capability, self.total_memory, 16)

    def cudaRuntimeGetVersion(self) -> int:
        return CUDA_VERSION

    def cudaDriverGetVersion(self) -> int:
        return CUDA_VERSION

    def cudaGetErrorString(self, error: cudaError_t) -> bytes:
        return MESSAGES[expect(error, cudaError_t)]

    def cudaGetErrorName(self, error: cudaError_t) -> bytes:
        return bytes(expect(error, cudaError_t).name, "ascii")

    def cudaDeviceSynchronize(self) -> None:
        self.drain()

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.total_memory - sum(self.live_allocations().values()), self.total_memory

    def cudaMalloc(self, size: int) -> int:
        if size + sum(self.live_allocations().values()) > self.total_memory:
            raise Failed(cudaError_t.cudaErrorMemoryAllocation)
        if size == 0:
            return 0
        block = np.full(size, POISON, np.uint8)
        self._blocks[block.ctypes.data] = block
        self._freed.discard(block.ctypes.data)
        return block.ctypes.data

    def cudaFree(self, devPtr: int) -> None:
        self.drain()
        if devPtr == 0:
            return
        assert devPtr not in self._freed, f"{devPtr:#x} is freed twice"
        assert devPtr in self._blocks, f"cudaFree({devPtr:#x}): cudaMalloc returned no such address"
        del self._blocks[devPtr]
        self._freed.add(devPtr)

    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:
        self.drain(0)
        self.view(devPtr, count)[:] = value

    def cudaMemcpy(self, dst: int, src: int, count: int, kind: cudaMemcpyKind) -> None:
        self.drain(0)
        self._copy(dst, src, count, kind, now=True)()

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> None:
        self.enqueue(stream, self._copy(dst, src, count, kind, now=False))

    def _copy(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, now: bool) -> Callable[[], None]:
        expect(kind, cudaMemcpyKind)
        if kind is cudaMemcpyKind.cudaMemcpyDefault:
            kind = cudaMemcpyKind(2 * self.inside(src) + self.inside(dst)) if self.inside(src) or self.inside(dst) else kind
        from_device = kind in (cudaMemcpyKind.cudaMemcpyDeviceToHost, cudaMemcpyKind.cudaMemcpyDeviceToDevice)
        to_device = kind in (cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToDevice)
        for address, on_device, role in ((src, from_device, "source"), (dst, to_device, "destination")):
            if on_device:
                self.view(address, count)
            else:
                assert address, f"{kind.name}: the {role} is a null pointer"
                assert not self.inside(address), f"{kind.name}: the {role} {address:#x} is device memory"
        # pageable host memory is staged before an asynchronous copy returns: the source may change or go afterwards
        staged = None if from_device else ctypes.string_at(src, count)

        def work() -> None:
            data = self.view(src, count).tobytes() if staged is None else staged
            if to_device:
                self.view(dst, count)[:] = np.frombuffer(data, np.uint8)
            else:
                ctypes.memmove(dst, data, count)

        return work

    def cudaStreamCreate(self) -> cudaStream_t:
        self._next += 0x10
        self._streams[self._next] = []
        return cudaStream_t(self._next)

    def cudaStreamCreateWithFlags(self, flags: int) -> cudaStream_t:
        if flags not in (0, 1):
            raise Failed(cudaError_t.cudaErrorInvalidValue)
        stream = self.cudaStreamCreate()
        if flags:
            self._nonblocking.add(int(stream))
        return stream

    def cudaStreamSynchronize(self, stream: int) -> None:
        assert stream in self._streams, f"stream {stream:#x} does not exist or was destroyed"
        self.drain(stream)

    def cudaStreamDestroy(self, stream: int) -> None:
        assert stream, "the default stream cannot be destroyed"
        self.cudaStreamSynchronize(stream)
        del self._streams[stream]

    def cudaEventCreate(self) -> cudaEvent_t:
        self._next += 0x10
        self._events[self._next] = None
        return cudaEvent_t(self._next)

    def cudaEventCreateWithFlags(self, flags: int) -> cudaEvent_t:
        return self.cudaEventCreate()

    def cudaEventRecord(self, event: int, stream: int) -> None:
        self._event(event)
        self._events[event] = (stream, None)

        def reach() -> None:
            if event in self._events:
                self._events[event] = (stream, time.perf_counter())

        self.enqueue(stream, reach)

    def cudaEventSynchronize(self, event: int) -> None:
        recorded = self._event(event)
        if recorded is not None:
            self.drain(recorded[0])

    def cudaEventElapsedTime(self, start: int, end: int) -> float:
        times = []
        for event in (start, end):
            recorded = self._event(event)
            if recorded is None:
                raise Failed(cudaError_t.cudaErrorInvalidResourceHandle)
            if recorded[1] is None:
                raise Failed(cudaError_t.cudaErrorNotReady)
            times.append(recorded[1])
        return (times[1] - times[0]) * 1e3

    def cudaEventDestroy(self, event: int) -> None:
        self._event(event)
        del self._events[event]

    def _event(self, event: int) -> tuple[int, float | None] | None:
        assert event in self._events, f"event {event:#x} does not exist or was destroyed"
        return self._events[event]


def expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def number(name: str, value: Any) -> Any:
    """Handles and addresses as ints; None is the default stream; anything but an int or a handle is refused."""
    if name in ("kind", "error"):
        return value
    if name == "stream":
        return 0 if value is None else int(expect(value, int | cudaStream_t))
    if name in ("event", "start", "end"):
        return int(expect(value, int | cudaEvent_t))
    if isinstance(value, bool | IntEnum) or not isinstance(value, int | np.integer):
        raise TypeError(f"argument {name!r}: an integer is required, got {type(value).__name__}")
    if value < 0:
        raise OverflowError(f"argument {name!r}: can't convert negative value {value}")
    return int(value)


def function(gpu: Gpu, name: str) -> Callable[..., tuple[Any, ...]]:
    """One function as the real module has it: exact arity, a tuple with the status first."""
    parameters = PARAMETERS[name]
    signature = inspect.Signature([inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters])

    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}({', '.join(parameters)}): {error}") from None
        values = [number(key, value) for key, value in bound.arguments.items()]
        gpu.calls.append(name)
        failed: tuple[None, ...] = () if name in RETURNS_NOTHING else (None, None) if name == "cudaMemGetInfo" else (None,)
        if name in gpu.fail:
            return (cudaError_t[gpu.fail[name]], *failed)
        try:
            result = getattr(gpu, name)(*values)
        except Failed as error:
            return (error.status, *failed)
        if name in RETURNS_NOTHING:
            return (cudaError_t.cudaSuccess,)
        return (cudaError_t.cudaSuccess, *result) if isinstance(result, tuple) else (cudaError_t.cudaSuccess, result)

    call.__name__, call.__doc__ = name, f"{name}({', '.join(parameters)})"
    return call


def modules(gpu: Gpu) -> dict[str, ModuleType]:
    """`cuda`, `cuda.bindings` and `cuda.bindings.runtime`, as sys.modules takes them."""
    names = ("cuda", "cuda.bindings", "cuda.bindings.runtime")
    made = {name: ModuleType(name, "A stand-in.") for name in names}
    for name, module in made.items():
        module.__spec__ = ModuleSpec(name, None, is_package=name != names[-1])
        if name != names[-1]:
            module.__path__ = []
    runtime = made[names[-1]]
    made["cuda"].bindings = made["cuda.bindings"]  # type: ignore[attr-defined]
    made["cuda.bindings"].runtime = runtime  # type: ignore[attr-defined]
    for each in (cudaError_t, cudaMemcpyKind, cudaStream_t, cudaEvent_t, cudaDeviceProp):
        setattr(runtime, each.__name__, each)
    for name in PARAMETERS:
        setattr(runtime, name, function(gpu, name))
    return made

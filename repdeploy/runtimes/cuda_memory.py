"""CUDA through NVIDIA's cuda-python: memory, a stream and events, without torch."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from repdeploy.errors import BackendFailed
from repdeploy.runtimes.interface import Missing


def missing() -> Missing | None:
    """What lacks for CUDA without torch."""
    if not _installed():
        return Missing("cuda-python is not installed (looked for cuda.bindings)", "pip install cuda-python")
    from cuda.bindings import runtime

    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        return Missing(f"no NVIDIA GPU answers (cudaGetDeviceCount: {_name(status)})", "check the driver with nvidia-smi")
    return None


def architecture() -> str:
    """The device's compute capability, as in sm90. Raises BackendFailed."""
    from cuda.bindings import runtime

    properties = call(runtime.cudaGetDeviceProperties(0))
    return f"sm{properties.major}{properties.minor}"


def call(result: Any) -> Any:
    """What a CUDA call returned beside its status. Raises BackendFailed where that is no success."""
    status, *values = result
    if int(status) != 0:
        raise BackendFailed(
            f"CUDA: {_name(status)}", hint="check the device with nvidia-smi; another process may hold its memory"
        )
    return values[0] if values else None


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))


def _installed() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings.runtime") is not None
    except ModuleNotFoundError:  # no package cuda at all
        return False


class DeviceArrays:
    """Named arrays on the device, one allocation each, on one stream. Close it to give them back."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        self.stream: Any = call(runtime.cudaStreamCreate())
        self._events = [call(runtime.cudaEventCreate()) for _ in range(2)]
        self._held: dict[str, tuple[Any, int]] = {}

    def room_for(self, name: str, size: int) -> int:
        """The address of at least that many bytes; what was there before is gone if it was smaller."""
        pointer, held = self._held.get(name, (None, -1))
        if held < size:
            if pointer is not None:
                call(self._cuda.cudaFree(pointer))
            pointer = call(self._cuda.cudaMalloc(max(size, 1)))
            self._held[name] = pointer, size
        return int(pointer)

    def upload(self, name: str, array: np.ndarray) -> int:
        """Copy an array to the device; returns its address."""
        array = np.ascontiguousarray(array)
        address = self.room_for(name, array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))
        self.synchronize()  # the host array may be gone afterwards
        return address

    def download(self, name: str, array: np.ndarray) -> np.ndarray:
        """Fill an array from the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(self._cuda.cudaMemcpyAsync(array.ctypes.data, self._held[name][0], array.nbytes, kind, self.stream))
        self.synchronize()
        return array

    def synchronize(self) -> None:
        call(self._cuda.cudaStreamSynchronize(self.stream))

    def start(self) -> None:
        """Begin to measure: what is enqueued from now on."""
        call(self._cuda.cudaEventRecord(self._events[0], self.stream))

    def stop(self) -> float:
        """Seconds on the device since `start`, when all that was enqueued is done."""
        call(self._cuda.cudaEventRecord(self._events[1], self.stream))
        call(self._cuda.cudaEventSynchronize(self._events[1]))
        return float(call(self._cuda.cudaEventElapsedTime(*self._events))) / 1000

    def close(self) -> None:
        for pointer, _ in self._held.values():
            call(self._cuda.cudaFree(pointer))
        self._held.clear()
        for event in self._events:
            call(self._cuda.cudaEventDestroy(event))
        self._events.clear()
        if self.stream is not None:
            call(self._cuda.cudaStreamDestroy(self.stream))
            self.stream = None

"""onnxruntime on the CPU (MLAS kernels) and on CUDA. Telemetry is off, threads and precision are pinned."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from repdeploy.errors import BackendFailed, words
from repdeploy.measurements import RanLayer
from repdeploy.runtimes import cuda_driver, onnx_profile
from repdeploy.runtimes.interface import ONNX, Feeds, Job, Missing

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
ONE_AFTER_THE_OTHER = MappingProxyType({"CUDA_LAUNCH_BLOCKING": "1"})
"""Kernels are launched and waited for one by one: without it the profile tells how long launching took, not running."""
ERRORS_ONLY = 3
"""Of onnxruntime's severities."""
Adjust = Callable[[Any], None]
"""What changes a SessionOptions before it is used."""


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    device: str
    name: str = "onnxruntime"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = ONNX

    @property
    def profile_environment(self) -> Mapping[str, str]:
        return ONE_AFTER_THE_OTHER if self.device == "cuda" else {}

    def missing(self) -> Missing | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return Missing("onnxruntime is not installed", f"pip install {self._package}")
        if self.device == "cpu":
            return None
        if CUDA_PROVIDER not in _onnxruntime().get_available_providers():
            return Missing(
                "onnxruntime is installed without CUDA", f"pip uninstall onnxruntime, then pip install {self._package}"
            )
        if not cuda_driver.device_count():
            return Missing("no NVIDIA GPU answers", "check the driver with nvidia-smi")
        return None

    @contextmanager
    def open(self, job: Job) -> Iterator[OnnxSession]:
        yield OnnxSession(self._file(job), job.threads, self._provider)

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        lacking = [f"{name}={value}" for name, value in self.profile_environment.items() if os.environ.get(name) != value]
        if lacking:
            raise BackendFailed(f"onnxruntime's profile on CUDA needs {', '.join(lacking)}", hint="set it before Python starts")
        path = self._file(job)
        with tempfile.TemporaryDirectory(prefix="onnxruntime-") as made:

            def load(adjust: Adjust) -> OnnxSession:
                return OnnxSession(path, job.threads, self._provider, adjust)

            return "onnxruntime's profile", onnx_profile.profiled(load, x, runs, Path(made))

    @property
    def _provider(self) -> str:
        return CUDA_PROVIDER if self.device == "cuda" else CPU_PROVIDER

    @property
    def _package(self) -> str:
        return "onnxruntime-gpu" if self.device == "cuda" else "onnxruntime"

    @staticmethod
    def _file(job: Job) -> Path:
        if job.onnx is None:
            raise BackendFailed("onnxruntime needs an ONNX file")
        return job.onnx()


CPU, CUDA = OnnxRuntime("cpu"), OnnxRuntime("cuda")


class OnnxSession:
    """Raises BackendFailed where onnxruntime does not take the file or the image, or does not run it on the provider."""

    def __init__(
        self, path: Path, threads: int = 0, provider: str = CPU_PROVIDER, adjust: Adjust = lambda options: None
    ) -> None:
        self._library: Any = _onnxruntime()
        self._library.set_default_logger_severity(ERRORS_ONLY)
        options = self._library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle sessions take the cores of others
        adjust(options)
        self._on_cuda = provider == CUDA_PROVIDER
        if self._on_cuda and hasattr(self._library, "preload_dlls"):
            self._library.preload_dlls()  # CUDA's and cuDNN's, where they were installed with pip
        try:
            self._session: Any = self._library.InferenceSession(str(path), options, providers=_providers(provider))
        except Exception as reason:  # its exceptions have no common base of their own
            raise BackendFailed(f"onnxruntime does not load {path.name}: {words(reason)}") from reason
        if (used := self._session.get_providers()[0]) != provider:
            raise BackendFailed(
                f"onnxruntime runs {path.name} on {used}, not on {provider}",
                hint="its CUDA provider did not load: it needs the versions of CUDA and cuDNN that its documentation names",
            )
        self.input_names: tuple[str, ...] = tuple(item.name for item in self._session.get_inputs())
        self.input_name = self.input_names[0]

    def run(self, x: np.ndarray) -> np.ndarray:
        return next(iter(self.run_all({self.input_name: x}).values()))

    def run_all(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        try:
            results = self._session.run(None, dict(feeds))
        except Exception as reason:
            shapes = ", ".join(str(array.shape) for array in feeds.values())
            raise BackendFailed(f"onnxruntime failed on an image of {shapes}: {words(reason)}") from reason
        return {output.name: result for output, result in zip(self._session.get_outputs(), results, strict=True)}

    def outputs(self, x: Feeds | np.ndarray) -> tuple[np.ndarray, ...]:
        """Every output, in the graph's order."""
        return tuple(self.run_all(x if isinstance(x, dict) else {self.input_name: x}).values())

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        """On CUDA the images are on the device already, and what comes out stays there."""
        feed = x if isinstance(x, dict) else {self.input_name: x}
        binding = self._bound(feed) if self._on_cuda else None

        def once() -> float:
            start = time.perf_counter()
            if binding is None:
                self._session.run(None, feed)
            else:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            return time.perf_counter() - start

        return once

    def end_profiling(self) -> Path:
        """The file that the profile was written to; only of a session that was loaded with profiling."""
        return Path(self._session.end_profiling())

    def _bound(self, feed: Feeds) -> Any:
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, self._library.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, "cuda")
        return binding


def _providers(provider: str) -> list[Any]:
    """What onnxruntime is asked for: beside CUDA the CPU, for the few operators that only it has."""
    return [(CUDA_PROVIDER, {"use_tf32": "0"}), CPU_PROVIDER] if provider == CUDA_PROVIDER else [provider]


def _onnxruntime() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime

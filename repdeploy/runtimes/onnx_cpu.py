"""onnxruntime on the CPU (MLAS kernels). Telemetry is off, threads are pinned."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repdeploy.errors import BackendFailed, words
from repdeploy.runtimes.interface import ONNX, Feeds, Job, Missing


@dataclass(frozen=True, slots=True)
class OnnxRuntimeCpu:
    name: str = "onnxruntime"
    device: str = "cpu"
    precision: str = "float32"
    needs: str = ONNX

    def missing(self) -> Missing | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return Missing("onnxruntime is not installed", "pip install onnxruntime")
        return None

    @contextmanager
    def open(self, job: Job) -> Iterator[OnnxSession]:
        if job.onnx is None:
            raise BackendFailed("onnxruntime needs an ONNX file")
        yield OnnxSession(job.onnx(), job.threads)


CPU = OnnxRuntimeCpu()


class OnnxSession:
    """Raises BackendFailed where onnxruntime does not take the file or the image."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as reason:  # its exceptions have no common base of their own
            raise BackendFailed(f"onnxruntime does not load {path.name}: {words(reason)}") from reason
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

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        feed = x if isinstance(x, dict) else {self.input_name: x}

        def once() -> float:
            start = time.perf_counter()
            self._session.run(None, feed)
            return time.perf_counter() - start

        return once

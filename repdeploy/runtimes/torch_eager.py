"""torch, operator by operator: on a CPU through oneDNN and MKL, on a GPU through cuDNN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from repdeploy.errors import BackendFailed
from repdeploy.measurements import RanLayer
from repdeploy.runtimes import cuda_profile, onednn_verbose
from repdeploy.runtimes.interface import NETWORK, Feeds, Job, Missing

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TYPES = {"float32": torch.float32, "float16": torch.float16}
ENQUEUED_RUNS = 30
Arguments = Tensor | dict[str, Tensor]


def missing(device: str) -> Missing | None:
    """What torch lacks for a device."""
    if device != "cuda" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return Missing(
            f"torch {torch.__version__} was built without CUDA", "install a CUDA build of torch (https://pytorch.org)"
        )
    return Missing("torch finds no CUDA device", "check the NVIDIA driver with nvidia-smi")


@dataclass(frozen=True, slots=True)
class TorchEager:
    """`layout`: of images and weights in memory; torch calls NHWC channels_last."""

    device: str
    name: str = "torch"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = NETWORK
    profile_environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(onednn_verbose.ENVIRONMENT))

    def missing(self) -> Missing | None:
        return missing(self.device)

    @contextmanager
    def open(self, job: Job) -> Iterator[TorchSession]:
        with prepared(job, self.device, self.precision, self.layout) as network:
            yield TorchSession(network, self.device, self.precision, self.layout)

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        with self.open(job) as session:
            once = session.once(x)
            once()  # weights are laid out for the kernels when these first run
            if self.device == "cuda":
                return "torch's profiler", cuda_profile.profiled(once, runs)
            return "oneDNN's verbose lines and torch's operators", onednn_verbose.profiled(once, runs)


@contextmanager
def prepared(job: Job, device: str, precision: str, layout: str) -> Iterator[nn.Module]:
    """A job's network on a device, with threads and precision pinned. Raises BackendFailed where the job has none."""
    if job.module is None:
        raise BackendFailed("torch runs bundles and ONNX files, not compiled ones")
    torch.set_num_threads(job.threads)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # precision is float32 and said so
    try:
        network = job.module().to(device, TYPES[precision])
        for _, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])
        yield network
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class TorchSession:
    def __init__(self, network: Callable[[Arguments], object], device: str, precision: str, layout: str) -> None:
        self.network, self.device = network, device
        self._type, self._format = TYPES[precision], FORMATS[layout]

    def run(self, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = self.network(self._moved(x))
        assert isinstance(found, Tensor)
        result: np.ndarray = found.float().cpu().numpy()
        return result

    def once(self, x: Feeds | np.ndarray) -> Callable[[], None]:
        """A function that runs the network once on x; on a GPU it returns when everything is enqueued."""
        images = self.arguments(x)

        def run() -> None:
            with torch.inference_mode():
                self.network(images)

        return run

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        once = self.once(x)

        def on_cpu() -> float:
            start = time.perf_counter()
            once()
            return time.perf_counter() - start

        return on_cpu if self.device == "cpu" else lambda: on_stream(once)

    def enqueue(self, x: Feeds | np.ndarray) -> tuple[float, ...]:
        """Seconds of the host until everything was enqueued, over some runs; none on a CPU."""
        if self.device == "cpu":
            return ()
        once, seen = self.once(x), []
        for _ in range(ENQUEUED_RUNS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            once()
            seen.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return tuple(seen)

    def arguments(self, x: Feeds | np.ndarray) -> Arguments:
        return {name: self._moved(array) for name, array in x.items()} if isinstance(x, dict) else self._moved(x)

    def _moved(self, array: np.ndarray) -> Tensor:
        # types that numpy has from elsewhere (bfloat16) as float32, in which torch computes here anyway
        tensor = torch.from_numpy(array if array.dtype.isbuiltin == 1 else array.astype(np.float32)).to(self.device)
        if tensor.is_floating_point():
            tensor = tensor.to(self._type)
        return tensor.contiguous(memory_format=self._format) if tensor.ndim == 4 else tensor


def on_stream(once: Callable[[], None]) -> float:
    """Seconds between two events around what `once` enqueues on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    once()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


CPU, CUDA = TorchEager("cpu"), TorchEager("cuda")
CPU_CHANNELS_LAST = TorchEager("cpu", "torch-channels-last", layout="NHWC")
CUDA_CHANNELS_LAST = TorchEager("cuda", "torch-channels-last", layout="NHWC")
CUDA_HALF = TorchEager("cuda", "torch-fp16-channels-last", "float16", "NHWC")

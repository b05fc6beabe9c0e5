"""torch, operator by operator: on a CPU through oneDNN and MKL, on a GPU through cuDNN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from repdeploy.errors import BackendFailed
from repdeploy.runtimes.interface import NETWORK, Feeds, Job, Missing


@dataclass(frozen=True, slots=True)
class TorchEager:
    device: str
    name: str = "torch"
    precision: str = "float32"
    needs: str = NETWORK

    def missing(self) -> Missing | None:
        if self.device != "cuda" or torch.cuda.is_available():
            return None
        if torch.version.cuda is None:
            return Missing(
                f"torch {torch.__version__} was built without CUDA", "install a CUDA build of torch (https://pytorch.org)"
            )
        return Missing("torch finds no CUDA device", "check the NVIDIA driver with nvidia-smi")

    @contextmanager
    def open(self, job: Job) -> Iterator[TorchSession]:
        if job.module is None:
            raise BackendFailed("torch runs bundles, not single ONNX files")
        torch.set_num_threads(job.threads)
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # precision is float32 and said so
        try:
            yield TorchSession(job.module().to(self.device), self.device)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


CPU, CUDA = TorchEager("cpu"), TorchEager("cuda")


class TorchSession:
    def __init__(self, network: nn.Module, device: str) -> None:
        self.network, self.device = network, device

    def run(self, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = self.network(torch.from_numpy(x).to(self.device)).cpu().numpy()
            return result

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        images = (
            {name: _tensor(array).to(self.device) for name, array in x.items()}
            if isinstance(x, dict)
            else _tensor(x).to(self.device)
        )

        def on_cpu() -> float:
            with torch.inference_mode():
                start = time.perf_counter()
                self.network(images)
                return time.perf_counter() - start

        def on_cuda() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.inference_mode():
                start.record()
                self.network(images)
                end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return on_cuda if self.device == "cuda" else on_cpu


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Types that numpy has from elsewhere (bfloat16) as float32, in which torch computes here anyway."""
    return torch.from_numpy(array if array.dtype.isbuiltin == 1 else array.astype(np.float32))

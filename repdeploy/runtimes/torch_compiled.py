"""torch.compile (Inductor): C++ kernels around oneDNN's convolutions on a CPU, Triton kernels around cuDNN's on a GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from repdeploy.errors import BackendFailed, words
from repdeploy.runtimes.interface import NETWORK, Job, Missing
from repdeploy.runtimes.torch_eager import TorchSession, missing, prepared


@dataclass(frozen=True, slots=True)
class TorchCompiled:
    """Compiling takes up to minutes per network and batch size, so a CPU measures it only where it is asked for."""

    device: str
    by_default: bool
    name: str = "torch-compile"
    precision: str = "float32"
    layout: str = "NCHW"
    needs: str = NETWORK

    def missing(self) -> Missing | None:
        if (absent := missing(self.device)) is not None:
            return absent
        compiler = os.environ.get("CXX", "g++")
        if self.device == "cpu" and shutil.which(compiler) is None:
            return Missing(f"torch.compile found no C++ compiler (looked for {compiler})", "apt-get install g++, or set CXX")
        return None

    @contextmanager
    def open(self, job: Job) -> Iterator[TorchSession]:
        with prepared(job, self.device, self.precision, self.layout) as network:
            torch._dynamo.reset()
            try:
                compiled = torch.compile(network, dynamic=False)
                yield TorchSession(compiled, self.device, self.precision, self.layout)
            except torch._dynamo.exc.TorchDynamoException as reason:
                raise BackendFailed(f"torch.compile failed: {words(reason)}") from reason


CPU, CUDA = TorchCompiled("cpu", by_default=False), TorchCompiled("cuda", by_default=True)

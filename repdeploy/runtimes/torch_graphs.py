"""torch through CUDA graphs: all kernels of a run are enqueued at once, so that launching them costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from repdeploy.runtimes.interface import NETWORK, Feeds, Job, Missing
from repdeploy.runtimes.torch_eager import TorchSession, missing, prepared

RUNS_BEFORE_CAPTURE = 3
"""On a stream of their own: cuDNN chooses its kernels and the allocator fills its pool before anything is captured."""


@dataclass(frozen=True, slots=True)
class TorchGraphs:
    name: str = "torch-cuda-graphs"
    device: str = "cuda"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = NETWORK

    def missing(self) -> Missing | None:
        return missing(self.device)

    @contextmanager
    def open(self, job: Job) -> Iterator[GraphSession]:
        with prepared(job, self.device, self.precision, self.layout) as network:
            yield GraphSession(network, self.device, self.precision, self.layout)


class GraphSession(TorchSession):
    """The images stay where they were captured; every run computes the same ones again."""

    def once(self, x: Feeds | np.ndarray) -> Callable[[], None]:
        run = super().once(x)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(RUNS_BEFORE_CAPTURE):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay(graph: torch.cuda.CUDAGraph = graph, kept: Callable[[], None] = run) -> None:
            graph.replay()  # `kept` holds the images, which the graph reads where they were

        return replay


CUDA = TorchGraphs()

"""What a runtime is, and what it is given to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from repdeploy.measurements import RanLayer
from repdeploy.vouching import Compiled

if TYPE_CHECKING:
    from torch import nn

NETWORK, ONNX = "network", "onnx"
Feeds = dict[str, np.ndarray]
"""A graph's inputs by name."""


@dataclass(frozen=True, slots=True)
class Job:
    """One network to run: as a module where there is one, as an ONNX file where there is one."""

    image: tuple[int, ...]
    threads: int
    module: Callable[[], nn.Module] | None = None
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    """Compiled or converted files of the same network, by kind, each vouched for."""
    onnx: Callable[[], Path] | None = None
    feeds: Callable[[int], Feeds] | None = None
    """Of a graph: its inputs by name at a batch size. Raises IllegalInput where the graph has another."""

    def inputs(self, batch: int, images: Callable[[], np.ndarray]) -> Feeds | np.ndarray:
        """What it runs on: the graph's inputs, else images."""
        return images() if self.feeds is None else self.feeds(batch)


@dataclass(frozen=True, slots=True)
class Missing:
    """What a runtime lacks on this machine, and how to get it."""

    what: str
    hint: str


class Session(Protocol):
    """A network that is loaded and ready."""

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        """A function that runs the network once on x and returns the seconds it took, device synchronised."""


@runtime_checkable
class Runtime(Protocol):
    """`name` and `device` make up a row of the benchmark."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def layout(self) -> str:
        """Of activations in memory, as the caller gives them: NCHW or NHWC."""

    @property
    def by_default(self) -> bool:
        """Whether a benchmark measures it without being asked for it by name."""

    @property
    def needs(self) -> str:
        """What of a network it runs: NETWORK, ONNX, or the kind of a compiled file ("tensorrt", "ncnn")."""

    def missing(self) -> Missing | None:
        """None when ready."""

    def open(self, job: Job) -> AbstractContextManager[Session]:
        """Load the network. Raises BackendFailed where the runtime does not take it."""


@runtime_checkable
class Enqueuing(Protocol):
    """A session whose host enqueues work for a device."""

    def enqueue(self, x: Feeds | np.ndarray) -> tuple[float, ...]:
        """Seconds of the host until everything was enqueued, one per run; none where host and device are one."""


@runtime_checkable
class Profiling(Protocol):
    """A runtime that can tell what ran inside a network. Others need not have it."""

    @property
    def profile_environment(self) -> Mapping[str, str]:
        """Variables that the process must have been started with, because libraries read them once."""

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        """How it is known, and every operator in the order it ran, with its median time. Raises BackendFailed."""

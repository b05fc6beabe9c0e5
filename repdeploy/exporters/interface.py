"""What an exporter is and what it is given: the target formats, ours and others', behind one small interface.

Entry-point group `repdeploy.exporters`. An exporter never sees a checkpoint or a family: it starts from a proved ONNX file (and
the network in torch, where there is one) and is judged by the same recorded references as every other artifact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repdeploy.exporters.options import Options
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check
from repdeploy.runtimes.interface import Feeds, Missing

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Case", "Exporter", "Feeds", "Missing", "Source", "Written"]


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs by name and the float64 outputs that belong to them. `label`: "batch 2"."""

    label: str
    feeds: Feeds
    wanted: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Source:
    """A proved ONNX file and what is known about it. `folder`: the bundle's, where `prepare` may leave what a target machine
    needs; `scratch`: an empty folder, where `write` leaves its files under their final names; `shapes`: of every input that a
    profile needs, without the batch; `batches`: smallest, optimal, largest; `image`: the name of the image in the references;
    `module`: the network in torch, float32."""

    onnx: Path
    artifact: Artifact
    cases: Sequence[Case]
    folder: Path
    scratch: Path
    shapes: Mapping[str, tuple[int, ...]]
    batches: tuple[int, int, int]
    options: Options
    image: str = ""
    module: Callable[[], nn.Module] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What an exporter wrote: the file that stands for the artifact, those that belong to it, and what was proved.

    `target`: the device and versions that it is for; `options`: how it was built, beyond what shapes the graph.
    """

    file: str
    precision: str
    checks: tuple[Check, ...]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    target: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


class Exporter(ABC):
    """One target format. `name` is the artifact's kind, and what `--to` takes."""

    name: str
    title: str

    @abstractmethod
    def missing(self) -> Missing | None:
        """What this machine lacks to write and check the format; None when ready."""

    def prepare(self, source: Source) -> tuple[str, ...]:
        """Leave in the bundle what another machine needs; returns what to tell. Done whether something is missing or not."""
        return ()

    @abstractmethod
    def write(self, source: Source, progress: Progress) -> Written:
        """Write the artifact into `source.scratch` and check it. Raises BackendFailed where the format's tools do, UsageError
        for a precision they lack."""

    @abstractmethod
    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        """Judge what was written earlier, and is intact, again. Raises BackendFailed."""

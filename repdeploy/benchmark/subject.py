"""What is measured: one network, or two that should be the same; told to child processes as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from repdeploy.bundle import Bundle
from repdeploy.runtimes.interface import Job
from repdeploy.vouching import PLAN_SUFFIXES, compiled_files, require_vouched

Source = Literal["training twin", "deploy", "graph", "plan", "compiled", "suite"]
WRITTEN: tuple[Source, ...] = ("training twin", "deploy", "suite")
"""Sources whose graph is written where a runtime needs one."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One network. `path`: a bundle, or a file; `graph`: its ONNX file, "" where there is none yet; `key`: of a suite's
    network, the suite and its name there."""

    name: str
    source: Source
    path: str
    graph: str = ""
    key: tuple[str, str] = ("", "")


def networks_of(subject: Path, needs: str = "", other: Path | None = None) -> tuple[Measured, ...]:
    """What a bundle or file has for a runtime that needs that (`Runtime.needs`): before and after, or one alone.

    `other`: an ONNX file that is measured beside the first.
    """
    path = str(subject.resolve())
    if other is not None:
        names = (subject.name, other.name) if subject.name != other.name else (str(subject), str(other))
        files = (path, str(other.resolve()))
        return tuple(Measured(name, "graph", file, graph=file) for name, file in zip(names, files, strict=True))
    if subject.suffix in PLAN_SUFFIXES:
        return (Measured("file", "plan", path),)
    if subject.is_file():
        return (Measured("file", "graph", path, graph=path),)
    bundle = Bundle(subject)
    squeezed = bundle.manifest.graph is not None
    if needs in compiled_files(bundle):
        return (Measured("squeezed" if squeezed else "deploy", "compiled", path),)
    if squeezed:
        graphs = {"original": bundle.graph_source(), "squeezed": bundle.squeezed_graph()}
        return tuple(Measured(name, "graph", path, graph=str(file.resolve())) for name, file in graphs.items())
    return Measured("training-time", "training twin", path), Measured("deploy", "deploy", path)


def with_graphs(networks: tuple[Measured, ...], image: tuple[int, ...], scratch: Path) -> tuple[Measured, ...]:
    """The same networks, each with its ONNX file; those that have none are written into `scratch`, as `export` writes them."""
    return tuple(
        replace(item, graph=str(_written(item, image, scratch))) if item.source in WRITTEN else item for item in networks
    )


def _written(item: Measured, image: Any, scratch: Path) -> Path:
    from repdeploy.exporters.folding import folded
    from repdeploy.exporters.onnx_file import write_onnx

    path = scratch / f"{item.name}.onnx"
    if not path.is_file():
        change = folded if item.source == "deploy" else None
        write_onnx(_network(item, image, static=True), path, image, batch=None, provenance={}, change=change)
    return path


def job_of(item: Measured, image: tuple[int, ...], threads: int) -> Job:
    """For a runtime, in the process that runs it. What it needs is built when it is asked for."""
    if item.source == "plan":  # whoever asked has vouched, or said that it is trusted
        return Job(image, threads, compiled={"tensorrt": require_vouched(Path(item.path), trusted=True)})
    if item.source == "compiled":
        return Job(image, threads, compiled=compiled_files(Bundle(Path(item.path))))
    graph = Path(item.graph)
    onnx: Callable[[], Path] | None = (lambda: graph) if item.graph else None
    if item.source == "graph":
        # without torch a graph is fed images, which is all that most graphs take
        feeds = partial(_graph_feeds, graph, image) if find_spec("torch") is not None else None
        return Job(image, threads, lambda: _graph_module(graph), onnx=onnx, feeds=feeds)
    return Job(image, threads, lambda: _network(item, image), onnx=onnx)


def _network(item: Measured, image: Any, static: bool = False) -> Any:
    if item.source == "suite":
        from repdeploy.suites import SUITES

        suite, name = item.key
        return SUITES[suite].entry(name).build()
    from repdeploy import registry
    from repdeploy.rebuild import deploy_network, training_twin

    bundle, families = Bundle(Path(item.path)), registry.families()
    if item.source == "deploy":
        return deploy_network(bundle, families, image)
    return training_twin(bundle, families, image, static=static)


def _graph_module(path: Path) -> Any:
    from repdeploy.graph.torch_module import GraphModule

    return GraphModule(path)


def _graph_feeds(path: Path, image: tuple[int, ...], batch: int) -> Any:
    from repdeploy.graph.onnx_source import read_onnx
    from repdeploy.graph.sample_inputs import of_batch

    return of_batch(read_onnx(path).model.graph, (batch, *image))


def from_request(item: Mapping[str, Any]) -> Measured:
    """As a child process is told."""
    return Measured(**{**item, "key": tuple(item["key"])})

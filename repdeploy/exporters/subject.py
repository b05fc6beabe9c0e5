"""What is exported: a bundle's network, whichever road it came by, as a float32 graph with the references it is judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from repdeploy import gates
from repdeploy.bundle import REFERENCES, Bundle, save_references
from repdeploy.digest import digest
from repdeploy.errors import BackendFailed, IllegalInput, InputError, words
from repdeploy.exporters import onnx_file
from repdeploy.exporters.ends import cases_with_ends
from repdeploy.exporters.interface import Case
from repdeploy.exporters.judging import require_float
from repdeploy.exporters.options import Options
from repdeploy.family import Family
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.torch_module import GraphModule
from repdeploy.progress import Progress
from repdeploy.rebuild import check_image, deploy_network
from repdeploy.records import Artifact, GraphReport

Image = tuple[int, int, int]

BATCHES = (1, 2, 5)
"""What an open batch is checked at."""
REFERENCE_IMAGES = 3
"""References at a deploy size of their own; larger batches repeat them."""
OTHER_SIZES = ((32, 64), (8, 24), (2, 4), (-2, -4))
"""Added to height and width: the first size the network takes is the second one that open image sizes are checked at."""


class Subject(ABC):
    """`shape`: (batch, channels, height, width); `dynamic`: the axes that stay open."""

    shape: tuple[int, ...]
    dynamic: tuple[str, ...]
    image: str
    output: str

    @abstractmethod
    def graph(self, options: Options) -> onnx.ModelProto:
        """In float32, before anything that `options` asks for is done to it. Raises BackendFailed, InputError."""

    @abstractmethod
    def cases(self, progress: Progress) -> tuple[Case, ...]:
        """Inputs and float64 outputs by the names in that graph."""

    @property
    @abstractmethod
    def provenance(self) -> Mapping[str, str]:
        """What the file says about where it comes from."""

    @property
    @abstractmethod
    def module(self) -> Callable[[], nn.Module]:
        """The network in torch, float32."""

    @property
    @abstractmethod
    def profiled(self) -> Mapping[str, tuple[int, ...]]:
        """The inputs whose batch an engine's profile has to state, without it."""


def subject_of(bundle: Bundle, families: Sequence[Family], shape: tuple[int, ...], options: Options) -> Subject:
    """Raises InputError or IllegalInput where the network cannot take the shape, or cannot be exported as asked."""
    if bundle.manifest.graph is not None:
        return Squeezed(bundle, bundle.manifest.graph, shape, options)
    return Described(bundle, families, shape, options)


class Described(Subject):
    """A network that families describe."""

    image, output = onnx_file.INPUT, onnx_file.OUTPUT

    def __init__(self, bundle: Bundle, families: Sequence[Family], shape: tuple[int, ...], options: Options) -> None:
        self._bundle, self._families, self.shape = bundle, families, shape
        self._image: Image = check_image(bundle, families, shape)
        self.dynamic = {"none": (), "batch": ("batch",), "spatial": ("batch", "height", "width")}[options.dynamic]
        self._limit = self._one_resolution()
        if options.dynamic == "spatial" and self._limit:
            raise InputError(
                f"--dynamic spatial: this network's graph holds at {self._image[1]}x{self._image[2]} only: {self._limit}",
                hint="leave it out, and export once per image size",
            )

    def graph(self, options: Options) -> onnx.ModelProto:
        batch = None if self.dynamic else self.shape[0]
        network = deploy_network(self._bundle, self._families, self._image)
        open_image = options.dynamic == "spatial"
        try:
            return onnx_file.exported(network, self._image, batch=batch, open_image=open_image, opset=options.opset_from(None))
        except BackendFailed as reason:
            if not open_image:
                raise
            raise InputError(
                f"this network cannot be exported with open image sizes: {reason}", hint="give --dynamic batch"
            ) from reason

    def cases(self, progress: Progress) -> tuple[Case, ...]:
        sizes = [self._image]
        if "height" in self.dynamic:
            sizes.append(self._other_size())
        found = [(image, *self._references(image, progress)) for image in sizes]
        batches = BATCHES if self.dynamic else (self.shape[0],)
        return tuple(of_batches(found, batches))

    @property
    def provenance(self) -> Mapping[str, str]:
        manifest = self._bundle.manifest
        _, height, width = self._image
        return {
            "source": manifest.source.file, "source_sha256": manifest.source.sha256, "weights_sha256": manifest.weights_sha256,
            "family": manifest.family, "architecture": manifest.architecture, "grade": manifest.verdict.grade,
            "version": manifest.tools.get("repdeploy", ""),
            **({"valid_at": f"{height}x{width} only: {self._limit}"} if self._limit else {}),
            **({"warnings": "; ".join(manifest.verdict.warnings)} if manifest.verdict.warnings else {}),
        }  # fmt: skip

    @property
    def module(self) -> Callable[[], nn.Module]:
        return lambda: deploy_network(self._bundle, self._families, self._image)

    @property
    def profiled(self) -> Mapping[str, tuple[int, ...]]:
        return {self.image: self._image}

    def _one_resolution(self) -> str:
        """Why a skeleton's graphs hold at one size only; empty where they do not."""
        skeletons = (item for family in self._families for item in family.skeletons)
        return next(item.one_resolution for item in skeletons if item.name == self._bundle.manifest.skeleton)

    def _other_size(self) -> Image:
        channels, height, width = self._image
        for taller, wider in OTHER_SIZES:
            try:
                return check_image(self._bundle, self._families, (1, channels, max(1, height + taller), max(1, width + wider)))
            except InputError:
                continue
        raise IllegalInput(
            f"--dynamic spatial: this network takes images of {height}x{width} and of no size near it", hint="leave it out"
        )

    def _references(self, image: Image, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and float64 outputs at an image size: the gates' own where they fit, else made from the proved weights."""
        known = self._bundle.references()
        if image not in known:
            progress("running the proved network in float64", 1, 3)
            images = gates.gate_images(image, batch=REFERENCE_IMAGES)
            exact = gates.run_in_chunks(deploy_network(self._bundle, self._families, image, torch.float64), images.double())
            known[image] = images.numpy(), exact.numpy()
            path = self._bundle.path / REFERENCES
            save_references(path, known)
            self._bundle.write_manifest(replace(self._bundle.manifest, references_sha256=digest(path)))
        return known[image]


class Squeezed(Subject):
    """A graph that was squeezed: its axes, its opset and its names are its own."""

    def __init__(self, bundle: Bundle, graph: GraphReport, shape: tuple[int, ...], options: Options) -> None:
        self._bundle, self._graph = bundle, graph
        own = bundle.own_artifact()
        self.shape, self.dynamic = own.input_shape, own.dynamic
        if shape[1:] != self.shape[1:]:
            raise InputError(
                f"this bundle was squeezed and proved at {'x'.join(map(str, self.shape))}",
                hint="convert the graph again with that --input-shape",
            )
        if options.dynamic == "spatial" or (options.dynamic == "none" and self.dynamic):
            raise InputError(
                f"--dynamic {options.dynamic}: the axes of this bundle's graph are its own, and are left as they are",
                hint="export the model with the axes you want, and convert that",
            )
        self.image, self.output = _ends_of(bundle)

    def graph(self, options: Options) -> onnx.ModelProto:
        path = self._bundle.squeezed_graph()
        model = read_onnx(path).model
        require_float(model)
        proto = ir.to_proto(ir.external_data.load_to_model(model))
        own = onnx_file.opset_of(proto)
        wanted = options.opset_from(own)
        if wanted is not None and wanted != own:
            try:
                proto = onnx.version_converter.convert_version(proto, wanted)
            except Exception as reason:  # it raises whatever C++ raises
                raise InputError(
                    f"this graph is in opset {own}, and onnx cannot convert it to {wanted}: {words(reason, 200)}",
                    hint=f"export the model in opset {wanted} and convert that",
                ) from reason
        onnx_file.strip(proto)
        return proto

    def cases(self, progress: Progress) -> tuple[Case, ...]:
        return sets_of(*self._bundle.graph_references())

    @property
    def provenance(self) -> Mapping[str, str]:
        source = self._bundle.manifest.source
        return {"source": source.file, "source_sha256": source.sha256}

    @property
    def module(self) -> Callable[[], nn.Module]:
        return lambda: _OneInput(GraphModule(self._bundle.squeezed_graph()), self.image)

    @property
    def profiled(self) -> Mapping[str, tuple[int, ...]]:
        # an input whose first axis is fixed needs no profile
        is_open = {port.name for port in self._graph.inputs if port.shape and not port.shape[0].isdigit()}
        return {name: shape[1:] for name, shape in self._graph.sampled if name in is_open or not self.dynamic}


class _OneInput(nn.Module):
    """A graph as a function of its image."""

    def __init__(self, graph: nn.Module, name: str) -> None:
        super().__init__()
        self.graph, self._name = graph, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.graph({self._name: x})
        return result


def recorded_cases(bundle: Bundle, artifact: Artifact) -> tuple[Case, ...]:
    """The references that a bundle holds for an artifact, as its ends make them; none where there are none of its size."""
    if bundle.manifest.graph is not None:
        cases = sets_of(*bundle.graph_references())
    else:
        known, own = bundle.references(), artifact.input_shape[1:]
        sizes = [own, *(image for image in known if image != own)] if "height" in artifact.dynamic else [own]
        batches = BATCHES if "batch" in artifact.dynamic else artifact.input_shape[:1]
        cases = tuple(of_batches([(image, *known[image]) for image in sizes if image in known], batches))
    return cases_with_ends(cases, *_ends_of(bundle), Options.of_ends(artifact.options))


def _ends_of(bundle: Bundle) -> tuple[str, str]:
    """The names of the image and of the first output in the graph that everything is made from."""
    graph = bundle.manifest.graph
    if graph is None:
        return onnx_file.INPUT, onnx_file.OUTPUT
    shape, sampled = bundle.own_artifact().input_shape, dict(graph.sampled)
    return next((name for name, size in sampled.items() if size == shape), next(iter(sampled))), graph.outputs[0].name


def of_batches(references: Sequence[tuple[tuple[int, ...], np.ndarray, np.ndarray]], batches: Sequence[int]) -> Iterator[Case]:
    """Every image size at every batch; what the references do not hold is repeated."""
    for image, inputs, outputs in references:
        size = f" of {'x'.join(map(str, image[1:]))}" if len(references) > 1 else ""
        for batch in batches:
            rows = [index % len(inputs) for index in range(batch)]
            feeds = {onnx_file.INPUT: np.ascontiguousarray(inputs[rows])}
            yield Case(f"batch {batch}{size}", feeds, {onnx_file.OUTPUT: np.ascontiguousarray(outputs[rows])})


def sets_of(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> tuple[Case, ...]:
    """A graph's recorded sets of inputs, one case each."""
    sets = len(next(iter(inputs.values()))) if inputs else 0
    return tuple(
        Case(
            f"set {index + 1} of {sets}",
            {name: np.asarray(array[index]) for name, array in inputs.items()},
            {name: np.asarray(array[index]) for name, array in outputs.items()},
        )
        for index in range(sets)
    )

"""A torch.export program (.pt2): the network for torch itself, without this package.

Source: torch.export.export, torch.export.save.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from repdeploy.errors import BackendFailed, InputError, words
from repdeploy.exporters.interface import Case, Exporter, Source, Written
from repdeploy.exporters.judging import judged
from repdeploy.exporters.onnx_file import EXAMPLE_BATCH
from repdeploy.exporters.options import Normalization, Options
from repdeploy.gates import exact_arithmetic
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check
from repdeploy.runtimes.interface import Feeds, Missing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPEN_AXES = {"batch": 0, "height": 2, "width": 3}
KEPT_META = ("val", "tensor_meta")
"""Of what torch notes about every node: the rest is source lines and paths of this machine."""


class TorchProgram(Exporter):
    name, title = "torch", "torch.export program"

    def missing(self) -> Missing | None:
        return None  # torch is what all this runs on

    def write(self, source: Source, progress: Progress) -> Written:
        feeds = source.cases[0].feeds
        if source.module is None or len(feeds) != 1 or any(array.dtype.kind != "f" for array in feeds.values()):
            raise InputError("a .pt2 is written for networks of one image in floating point", hint="leave --torch out")
        precision, dynamic = source.artifact.precision, source.artifact.dynamic
        network = WithEnds(source.module(), source.options, DTYPES[precision], DTYPES[source.options.io])
        _, *image = source.artifact.input_shape
        batch = EXAMPLE_BATCH if "batch" in dynamic else source.artifact.input_shape[0]
        example = torch.zeros(batch, *image, dtype=DTYPES[source.options.io])
        # images may be as small as the network allows, which torch finds out
        sizes = {axis: torch.export.Dim(axis) if axis == "batch" else torch.export.Dim.DYNAMIC for axis in dynamic}
        shapes = ({OPEN_AXES[axis]: size for axis, size in sizes.items()},) if dynamic else None
        path = source.scratch / f"model.{precision}.pt2"
        program = _exported(network.eval(), example, shapes)
        _strip(program)
        torch.export.save(program, path)
        checks = tuple(_checks(path, precision, source.cases))
        notes: tuple[str, ...] = () if "height" in dynamic else (f"{path.name} takes images of {'x'.join(map(str, image))}",)
        if precision != "fp32":
            notes += (f"{path.name} computes in {precision} throughout: it keeps no layer in float32",)
        return Written(path.name, precision, checks, notes=notes, target=f"torch {torch.__version__}")

    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        return _checks(path, artifact.precision, cases)


class WithEnds(nn.Module):
    """A network between what the options put at its ends; `dtype`: what it computes in, `io`: what it takes and gives."""

    def __init__(self, network: nn.Module, options: Options, dtype: torch.dtype, io: torch.dtype) -> None:
        super().__init__()
        self.network, self._dtype, self._io, self._softmax = network.to(dtype), dtype, io, options.softmax
        self._normalizes = options.normalize is not None
        normalization = options.normalize or Normalization((0.0,), (1.0,))
        for name, values in (("mean", normalization.mean), ("deviation", normalization.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self._normalizes:
            x = (x.float() - self.get_buffer("mean")) / self.get_buffer("deviation")
        y: Tensor = self.network(x.to(self._dtype))
        return (y.float().softmax(1) if self._softmax else y).to(self._io)


def _exported(network: nn.Module, example: Tensor, shapes: Any) -> Any:
    """With sizes that may be 1 or without, whichever torch accepts: small images lead to maps of one pixel, while some networks
    can only be read for more than one image. Raises BackendFailed with what torch said."""
    reasons = []
    ways = (nullcontext(), _sizes_of_one())
    for sizes in reversed(ways) if shapes and len(shapes[0]) > 1 else ways:
        try:
            with warnings.catch_warnings(), torch.no_grad(), sizes:
                warnings.simplefilter("ignore")
                return torch.export.export(network, (example,), dynamic_shapes=shapes)
        except Exception as reason:  # torch.export raises whatever its many parts raise
            reasons.append(reason)
    hint = "give --dynamic none, or leave --torch out" if shapes is not None else "leave --torch out"
    raise BackendFailed(f"torch.export failed: {words(reasons[0], 160)}", hint=hint) from reasons[0]


def _sizes_of_one() -> AbstractContextManager[None]:
    """Let open sizes be 1 at run time: by itself torch.export takes it that they never are."""
    if not hasattr(_config, "backed_size_oblivious"):  # as before torch 2.7
        return nullcontext()
    oblivious: AbstractContextManager[None] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return oblivious


def _strip(program: Any) -> None:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta = {name: node.meta[name] for name in KEPT_META if name in node.meta}


def _checks(path: Path, precision: str, cases: Sequence[Case]) -> list[Check]:
    """The file as anyone loads it. Raises BackendFailed where torch does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.export.load(path)
            module = program.module()
    except Exception as reason:
        raise BackendFailed(f"torch does not load {path.name}: {words(reason)}") from reason
    example = next(value.meta["val"] for value in program.graph.nodes if value.name in program.graph_signature.user_inputs)

    def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
        with exact_arithmetic():
            (x,) = (torch.from_numpy(array).to(example.dtype) for array in feeds.values())
            try:
                answer = module(x).float().numpy()
            except Exception as reason:  # guards that the program carries
                said = words(reason)
                raise BackendFailed(f"{path.name} does not run on {tuple(x.shape)}: {said}") from reason
            return dict.fromkeys(cases[0].wanted, answer)

    return judged(run, cases, precision, f"{path.name} in torch")


EXPORTER = TorchProgram()

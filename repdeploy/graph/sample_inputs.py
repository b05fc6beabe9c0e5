"""Inputs for a graph: sizes for what it leaves open, and numbers of the types it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from repdeploy.errors import IllegalInput, InputError
from repdeploy.network import sample_images

BATCH = 2
"""Of an open batch: one image would hide what mixes images."""
IMAGES = ((65, 63), (64, 96), (224, 224), (256, 256), (640, 640))
"""Sizes tried in turn for an image whose size is open: odd and not square where the graph takes that."""
OTHER = 8
"""Of an open axis that is neither batch nor image."""
IMAGE_RANK = 4

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class InputPlan:
    """Name, type and shape of every input; `batched`: the inputs and axes that are the open batch of the image."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, ir.DataType]
    batched: tuple[tuple[str, int], ...]
    open_image: bool
    image: str

    @property
    def open_batch(self) -> bool:
        return bool(self.batched)

    def arrays(self, seed: int) -> Arrays:
        """One set of inputs: structured images, noise, and zeros and ones for whole numbers."""
        generator = np.random.default_rng(seed)
        made: Arrays = {}
        for name, shape in self.shapes.items():
            dtype = self.dtypes[name]
            if not dtype.is_floating_point():
                made[name] = generator.integers(0, 2, shape).astype(dtype.numpy())
            elif len(shape) == IMAGE_RANK:
                made[name] = sample_images(shape, seed).numpy().astype(dtype.numpy())
            else:
                made[name] = generator.standard_normal(shape).astype(dtype.numpy())
        return made

    def with_batch(self, batch: int) -> InputPlan:
        """The same with another size of an open batch."""
        shapes = {
            name: tuple(batch if (name, axis) in self.batched else size for axis, size in enumerate(shape))
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=shapes)


def of_batch(graph: ir.Graph, shape: tuple[int, ...]) -> Arrays:
    """Inputs at a batch and image size. Raises IllegalInput where the graph has another."""
    try:
        return plans(graph, shape)[0].arrays(seed=shape[0])
    except InputError as reason:
        raise IllegalInput(f"the graph takes no batch of {'x'.join(map(str, shape))}", hint=reason.hint) from reason


def plans(graph: ir.Graph, wanted: tuple[int, ...] | None) -> list[InputPlan]:
    """Ways to feed a graph, the best first: one where all sizes are fixed or stated, else one per image size to try.

    Raises InputError where `wanted` contradicts the graph or an input is no tensor.
    """
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    if not inputs:
        raise InputError("the graph takes no input, so there is nothing to run", hint="export the model with its input")
    for value in inputs:
        if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
            raise InputError(f"the input {value.name} has no shape, or is no tensor of numbers", hint="export it with a shape")
    empty = next((value for value in inputs if 0 in tuple(value.shape or ())), None)
    if empty is not None:
        raise InputError(f"the input {empty.name} has no values: its shape is {empty.shape}", hint="export it with a shape")
    images = [value for value in inputs if len(value.shape or ()) == IMAGE_RANK]
    # the one that --input-shape is about: rather one whose batch is open than one that happens to stand first
    image = next((value for value in images if not _is_fixed(next(iter(value.shape or (1,))))), (images or inputs)[0])
    sizes: dict[str, int] = {}
    if wanted is not None:
        sizes = _stated(image, wanted)
    tried = [_plan(inputs, image, sizes, (height, width)) for height, width in IMAGES]
    return tried if tried[0].open_image else tried[:1]


def _stated(image: ir.Value, wanted: tuple[int, ...]) -> dict[str, int]:
    """The open sizes that --input-shape decides."""
    own = tuple(size if _is_fixed(size) else None for size in image.shape or ())
    if len(own) != len(wanted) or any(isinstance(size, int) and size != other for size, other in zip(own, wanted, strict=True)):
        asked, has = "x".join(map(str, wanted)), "x".join("?" if size is None else str(size) for size in own)
        raise InputError(
            f"--input-shape {asked}: the input {image.name} is {has}",
            hint="leave it out where the graph fixes its sizes, or export the model at another size",
        )
    found: dict[str, int] = {}
    for axis, size in enumerate(own):
        if size is None and found.setdefault(_key(image, axis), wanted[axis]) != wanted[axis]:
            raise InputError(
                f"--input-shape {'x'.join(map(str, wanted))}: {_key(image, axis)} is one size, twice in {image.name}",
                hint="give both axes the same size",
            )
    return found


def _is_fixed(size: object) -> TypeGuard[int]:
    """Some exporters write -1 for an open size."""
    return isinstance(size, int) and size >= 0


def _key(value: ir.Value, axis: int) -> str:
    """What an open axis goes by: its own name, or where it is."""
    size = (value.shape or ())[axis]
    name = size.value if isinstance(size, ir.SymbolicDim) else None
    return name or f"{value.name}[{axis}]"


def _plan(inputs: list[ir.Value], image: ir.Value, stated: Mapping[str, int], side: tuple[int, int]) -> InputPlan:
    sizes, shapes, keys, open_image = dict(stated), {}, {}, False
    for value in inputs:
        shape: list[int] = []
        for axis, size in enumerate(value.shape or ()):
            if _is_fixed(size):
                shape.append(size)
                continue
            key = keys[value.name or "", axis] = _key(value, axis)
            is_side = len(value.shape or ()) == IMAGE_RANK and axis >= 2
            open_image = open_image or (value is image and is_side and key not in stated)
            shape.append(sizes.setdefault(key, BATCH if axis == 0 else side[axis - 2] if is_side else OTHER))
        shapes[value.name or ""] = tuple(shape)
    dtypes = {value.name or "": value.dtype or ir.DataType.FLOAT for value in inputs}
    batch = keys.get((image.name or "", 0))
    batched = tuple(place for place, key in keys.items() if key == batch)
    return InputPlan(shapes, dtypes, batched, open_image, image.name or "")

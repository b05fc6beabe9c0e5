"""The images an ONNX file takes, read from its first lines alone: neither its weights nor a tensor library are needed."""

from __future__ import annotations

import math
from pathlib import Path

from repdeploy.errors import UnreadableCheckpoint, UsageError, words

IMAGE_RANK = 4
FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
"""Of ONNX's types (onnx.proto, TensorProto.DataType)."""


def known_file(path: Path) -> Path:
    """Raises UsageError for a file that is no ONNX file."""
    if path.suffix != ".onnx":
        raise UsageError(f"{path.name} is neither a bundle nor an ONNX file", hint="give a bundle's folder or an .onnx file")
    return path


def image_of(path: Path) -> tuple[tuple[int | None, ...], str]:
    """The shape of a file's image, or of its first input (None where it is dynamic), and the name of that input."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as reason:  # protobuf's DecodeError has no public name
        raise UnreadableCheckpoint(
            f"{path.name} is no ONNX file: {words(reason, 120)}", hint="export it again, or copy it again"
        ) from reason
    weights = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in weights]
    images = [item for item in inputs if len(item.type.tensor_type.shape.dim) == IMAGE_RANK]
    first = next(iter(images or inputs), None)
    if first is None:
        raise UnreadableCheckpoint(f"{path.name} holds no graph with an input", hint="export it again, or copy it again")
    dims = first.type.tensor_type.shape.dim
    # some exporters write -1 for an open size
    sizes = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)
    return sizes, first.name


def float_type(path: Path) -> str:
    """The type that most weights of a file have: "float32", "float16", "bfloat16" or "float64"."""
    import onnx

    counts: dict[str, int] = {}
    graph = onnx.load(path, load_external_data=False).graph
    constants = (attribute.t for node in graph.node for attribute in node.attribute if attribute.name == "value")
    for tensor in (*graph.initializer, *constants):
        name = FLOATS.get(tensor.data_type)
        if name is not None:
            counts[name] = counts.get(name, 0) + math.prod(tensor.dims)
    return max(counts, key=lambda name: counts[name], default="float32")


def fixed_batch(path: Path) -> int | None:
    """The batch that an ONNX file is fixed to; None where it is open."""
    sizes = image_of(known_file(path))[0]
    return sizes[0] if sizes else None


def image_of_file(path: Path, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The image an ONNX file takes, or the one that was asked for. Raises UsageError where neither is known."""
    own, name = image_of(known_file(path))
    if len(own) != IMAGE_RANK:
        sizes = "x".join("?" if size is None else str(size) for size in own) or "a number"
        raise UsageError(
            f"{path.name} takes no images: its input {name} is {sizes}",
            hint="networks are measured on images (batch, channels, height, width); export it with such an input",
        )
    channels, height, width = shape[1:] if shape else own[1:]
    if channels is None or height is None or width is None:
        raise UsageError(f"{path.name} takes images of any size", hint="choose one with --input-shape 1x3x224x224")
    return channels, height, width

"""The images an ONNX file takes, read from its first lines alone: neither its weights nor a tensor library are needed."""

from __future__ import annotations

from pathlib import Path

from repdeploy.errors import UnreadableCheckpoint, UsageError, words


def known_file(path: Path) -> Path:
    """Raises UsageError for a file that is no ONNX file."""
    if path.suffix != ".onnx":
        raise UsageError(f"{path.name} is neither a bundle nor an ONNX file", hint="give a bundle's folder or an .onnx file")
    return path


def image_of(path: Path) -> tuple[tuple[int | None, ...], str]:
    """The shape of a file's first input (None where it is dynamic) and the name of that input."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as reason:  # protobuf's DecodeError has no public name
        raise UnreadableCheckpoint(
            f"{path.name} is no ONNX file: {words(reason, 120)}", hint="export it again, or copy it again"
        ) from reason
    weights = {item.name for item in graph.initializer}
    first = next((item for item in graph.input if item.name not in weights), None)
    if first is None:
        raise UnreadableCheckpoint(f"{path.name} holds no graph with an input", hint="export it again, or copy it again")
    dims = first.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims), first.name


def fixed_batch(path: Path) -> int | None:
    """The batch that an ONNX file is fixed to; None where it is open."""
    sizes = image_of(known_file(path))[0]
    return sizes[0] if sizes else None


def image_of_file(path: Path, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The image an ONNX file takes, or the one that was asked for. Raises UsageError where neither is known."""
    own, _ = image_of(known_file(path))
    channels, height, width = shape[1:] if shape else own[1:] if len(own) == 4 else (None, None, None)
    if channels is None or height is None or width is None:
        raise UsageError(f"{path.name} takes images of any size", hint="choose one with --input-shape 1x3x224x224")
    return channels, height, width

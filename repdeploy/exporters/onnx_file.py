"""Write an ONNX file: torch's exporter, then everything that would differ from machine to machine is taken out.

Source: torch.onnx.export(dynamo=True); ONNX IR specification for metadata_props.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._pytree import tree_flatten_with_path

from repdeploy.errors import BackendFailed, InputError
from repdeploy.graph.onnx_source import write_proto
from repdeploy.network import sample_images

PRODUCER = "repdeploy"
INPUT, OUTPUT = "input", "output"
EXAMPLE_BATCH = 2
"""An example batch of 1 would be taken for a constant."""


def write_onnx(
    network: nn.Module,
    path: Path,
    image: tuple[int, int, int],
    *,
    batch: int | None,
    provenance: Mapping[str, str],
    change: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
) -> int:
    """Write the network; `batch` None keeps the batch dynamic, under the name "batch". Returns the opset read back.

    `change`: what is done to the graph before it is checked and written. The file is the same, byte for byte, for the same
    network. Raises BackendFailed where the exporter or the checker does.
    """
    example = sample_images((EXAMPLE_BATCH if batch is None else batch, *image), seed=0)
    model = _exported(network, example, dynamic=batch is None, names=([INPUT], [OUTPUT]))
    _strip(model)
    if change is not None:
        model = change(model)
    model.producer_name, model.producer_version = PRODUCER, ""
    for key, value in provenance.items():
        model.metadata_props.add(key=f"repdeploy.{key}", value=value)
    write_proto(model, path)
    opset: int = next(item.version for item in model.opset_import if item.domain == "")
    return opset


def write_plain(network: nn.Module, path: Path, shape: tuple[int, ...]) -> list[str]:
    """Write a network with every layer as it was trained: nothing folded, nothing optimised. Returns what is to be noted.

    The batch stays open where the exporter allows it; where torch's exporter fails, the TorchScript one is tried.
    Raises InputError with both reasons where neither exports the network.
    """
    example = sample_images((max(shape[0], EXAMPLE_BATCH), *shape[1:]), seed=0)
    names = ([INPUT], _output_names(network, example))
    reasons = []
    attempts: tuple[tuple[Callable[[], onnx.ModelProto], str], ...] = (
        (lambda: _exported(network, example, dynamic=True, optimize=False, names=names), ""),
        (
            lambda: _exported(network, sample_images(shape, seed=0), dynamic=False, optimize=False, names=names),
            "its batch is fixed",
        ),
        (lambda: _traced(network, example, names), "torch's exporter could not export it; the TorchScript exporter did"),
    )
    for attempt, note in attempts:
        try:
            model = attempt()
        except BackendFailed as reason:
            reasons.append(str(reason))
            continue
        del model.metadata_props[:]
        write_proto(model, path)
        return [note] if note else []
    raise InputError(
        f"the network cannot be exported to ONNX. {' '.join(dict.fromkeys(reasons))}",
        hint="export it with your own code and convert the .onnx file",
    )


def _output_names(network: nn.Module, example: Tensor) -> list[str]:
    """By what a network's answer calls them: {"boxes": ..., "masks": [a, b]} -> boxes, masks.0, masks.1.

    Raises InputError where it does not take the example.
    """
    try:
        with torch.no_grad():
            leaves, _ = tree_flatten_with_path(network(example))
    except Exception as reason:  # whatever the user's network raises
        shape = "x".join(map(str, example.shape))
        raise InputError(
            f"the network does not take images of {shape}: {type(reason).__name__}: {_short(reason)}",
            hint="state what it takes with --input-shape",
        ) from reason
    leaves = list({id(leaf): (path, leaf) for path, leaf in reversed(leaves)}.values())[::-1]  # a graph names a tensor once
    steps = [[str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path] for path, _ in leaves]
    return [".".join(path) if path and not path[0].isdigit() else OUTPUT + ".".join(path) for path in steps]


def _exported(
    network: nn.Module,
    example: Tensor,
    *,
    dynamic: bool,
    optimize: bool = True,
    names: tuple[list[str] | None, list[str] | None] = (None, None),
) -> onnx.ModelProto:
    """Through torch's exporter. Raises BackendFailed with what it said."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return _attempted(
        lambda: torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            optimize=optimize,
            input_names=names[0],
            output_names=names[1],
        ),
        lambda program: program.model_proto,
    )


def _traced(network: nn.Module, example: Tensor, names: tuple[list[str], list[str]]) -> onnx.ModelProto:
    """Through the TorchScript exporter, batch norms kept. Raises BackendFailed with what it said."""
    buffer = io.BytesIO()

    def export() -> None:
        with warnings.catch_warnings():
            # a branch that depends on the image would be frozen into the graph
            warnings.simplefilter("error", TracerWarning)
            _trace()

    def _trace() -> None:
        torch.onnx.export(
            network,
            (example,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes={INPUT: {0: "batch"}},
        )

    return _attempted(export, lambda _: onnx.load_from_string(buffer.getvalue()))


def _attempted(export: Callable[[], Any], read: Callable[[Any], onnx.ModelProto]) -> onnx.ModelProto:
    try:
        with _quiet() as said:
            return read(export())
    except Exception as reason:  # the exporters raise whatever their many parts raise
        if _interrupted(reason):
            raise KeyboardInterrupt from reason
        hint = f"it said: {said.getvalue()[-300:]}" if said.getvalue() else "run with --debug for the whole trace"
        raise BackendFailed(f"torch.onnx.export failed: {_short(_root(reason))}", hint=hint) from reason


def _root(reason: BaseException) -> BaseException:
    """The error behind the exporter's errors, which say how to debug the exporter."""
    while (cause := reason.__cause__ or (None if reason.__suppress_context__ else reason.__context__)) is not None:
        reason = cause
    return reason


def _short(reason: BaseException) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(reason)).split())[:300]


def is_ours(path: Path) -> bool:
    """Whether a file is an ONNX file that was written here."""
    if path.suffix != ".onnx":
        return False
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf answers foreign bytes with errors of its own
        return False
    return model.producer_name == PRODUCER or any(item.key.startswith(f"{PRODUCER}.") for item in model.metadata_props)


def image_of(path: Path) -> tuple[tuple[int | None, ...], str]:
    """The shape of a file's first input (None where it is dynamic) and the name of that input."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {item.name for item in graph.initializer}
    first = next(item for item in graph.input if item.name not in weights)
    dims = first.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims), first.name


def _interrupted(reason: BaseException | None) -> bool:
    """Whether Ctrl-C stands behind an error: the exporter wraps whatever reaches it."""
    while reason is not None:
        if isinstance(reason, KeyboardInterrupt):
            return True
        reason = reason.__cause__ or reason.__context__
    return False


def _strip(model: Any) -> None:
    """Remove local paths, source lines and trace names; name every layer after the tensors it holds."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = "network"
    for item in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    weights = {item.name for item in model.graph.initializer}
    named: dict[str, int] = {}
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        owner = next((name for name in node.input if name in weights and name.endswith(".weight")), None)
        if owner is not None:
            name = owner.removesuffix(".weight")
            named[name] = named.get(name, 0) + 1  # layers with equal weights share their tensors
            node.name = name if named[name] == 1 else f"{name}.{named[name]}"


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints progress and warns about its own internals: keep it off the user's screen."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

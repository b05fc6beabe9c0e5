"""Write an ONNX file: torch's exporter, then everything that would differ from machine to machine is taken out.

Source: torch.onnx.export(dynamo=True); ONNX IR specification for metadata_props.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._pytree import tree_flatten_with_path

from repdeploy.errors import BackendFailed, InputError, words
from repdeploy.graph.onnx_source import write_proto
from repdeploy.network import sample_images

PRODUCER = "repdeploy"
INPUT, OUTPUT = "input", "output"
EXAMPLE_BATCH = 2
"""An example batch of 1 would be taken for a constant."""
OLDEST_OF_TORCH = 18
"""The opset below which torch's own exporter writes this one without a word."""


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
    model = exported(network, image, batch=batch)
    if change is not None:
        model = change(model)
    stamp(model, provenance)
    write_proto(model, path)
    return opset_of(model)


def exported(
    network: nn.Module,
    image: tuple[int, int, int],
    *,
    batch: int | None,
    open_image: bool = False,
    opset: int | None = None,
) -> onnx.ModelProto:
    """The network as a graph, with one name per layer and nothing of this machine in it.

    `batch` None, `open_image`: these axes stay open, as "batch", "height" and "width". `opset`: below 18 through the
    TorchScript exporter, since torch's own then writes 18. Raises BackendFailed where an exporter does, or where the opset
    read back is another one, InputError where the network fixes an axis that was to stay open.
    """
    example = sample_images((EXAMPLE_BATCH if batch is None else batch, *image), seed=0)
    axes = {0: "batch"} if batch is None else {}
    axes |= {2: "height", 3: "width"} if open_image else {}
    if opset is None or opset >= OLDEST_OF_TORCH:
        model = _exported(network, example, axes, opset=opset, names=([INPUT], [OUTPUT]))
    else:
        try:
            model = _traced(network, example, axes, ([INPUT], [OUTPUT]), opset=opset)
        except BackendFailed as reason:
            raise BackendFailed(
                f"this network could not be written in opset {opset}: {reason}", hint="give a newer --opset, or leave it out"
            ) from reason
    if opset is not None and opset_of(model) != opset:
        raise BackendFailed(
            f"torch.onnx.export was asked for opset {opset} and wrote {opset_of(model)}",
            hint="leave --opset out, or give another",
        )
    dims = model.graph.input[0].type.tensor_type.shape.dim
    fixed = [name for axis, name in axes.items() if dims[axis].dim_param != name]
    if fixed:
        raise InputError(
            f"this network cannot be exported with an open {' and '.join(fixed)}: the exporter fixed it",
            hint="give --dynamic none, or batch if that is not what is fixed",
        )
    strip(model)
    _name_layers(model)
    return model


def opset_of(model: onnx.ModelProto) -> int:
    opset: int = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    return opset


def stamp(model: onnx.ModelProto, provenance: Mapping[str, str]) -> None:
    """Say in the file where it comes from; what was said before under these names is replaced."""
    model.producer_name, model.producer_version = PRODUCER, ""
    kept = {item.key: item.value for item in model.metadata_props if item.key.startswith(f"{PRODUCER}.")}
    kept |= {f"{PRODUCER}.{key}": value for key, value in provenance.items()}
    del model.metadata_props[:]
    for key, value in kept.items():
        model.metadata_props.add(key=key, value=value)


def write_plain(network: nn.Module, path: Path, shape: tuple[int, ...]) -> list[str]:
    """Write a network with every layer as it was trained: nothing folded, nothing optimised. Returns what is to be noted.

    The batch stays open where the exporter allows it; where torch's exporter fails, the TorchScript one is tried.
    Raises InputError with both reasons where neither exports the network.
    """
    example = sample_images((max(shape[0], EXAMPLE_BATCH), *shape[1:]), seed=0)
    names, open_batch = ([INPUT], _output_names(network, example)), {0: "batch"}
    reasons = []
    attempts: tuple[tuple[Callable[[], onnx.ModelProto], str], ...] = (
        (lambda: _exported(network, example, open_batch, optimize=False, names=names), ""),
        (lambda: _exported(network, sample_images(shape, seed=0), {}, optimize=False, names=names), "its batch is fixed"),
        (
            lambda: _traced(network, example, open_batch, names, as_trained=True),
            "torch's exporter could not export it; the TorchScript exporter did",
        ),
    )
    for attempt, note in attempts:
        try:
            model = attempt()
        except BackendFailed as reason:
            reasons.append(str(reason))
            continue
        strip(model)
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
            f"the network does not take images of {shape}: {type(reason).__name__}: {words(reason)}",
            hint="state what it takes with --input-shape",
        ) from reason
    leaves = list({id(leaf): (path, leaf) for path, leaf in reversed(leaves)}.values())[::-1]  # a graph names a tensor once
    steps = [[str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path] for path, _ in leaves]
    return [".".join(path) if path and not path[0].isdigit() else OUTPUT + ".".join(path) for path in steps]


def _exported(
    network: nn.Module,
    example: Tensor,
    axes: Mapping[int, str],
    *,
    optimize: bool = True,
    opset: int | None = None,
    names: tuple[list[str] | None, list[str] | None] = (None, None),
) -> onnx.ModelProto:
    """Through torch's exporter; `axes`: what stays open, and its names. Raises BackendFailed with what it said."""
    shapes = ({axis: torch.export.Dim(name) for axis, name in axes.items()},) if axes else None
    return _attempted(
        lambda: torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            optimize=optimize,
            opset_version=opset,
            input_names=names[0],
            output_names=names[1],
        ),
        lambda program: program.model_proto,
    )


def _traced(
    network: nn.Module,
    example: Tensor,
    axes: Mapping[int, str],
    names: tuple[list[str], list[str]],
    *,
    opset: int | None = None,
    as_trained: bool = False,
) -> onnx.ModelProto:
    """Through the TorchScript exporter; `as_trained`: batch norms kept. Raises BackendFailed with what it said."""
    buffer = io.BytesIO()

    def export() -> None:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            stack.enter_context(_without_stdout())
            if as_trained:  # a branch that depends on the image would be frozen into the graph; skeletons have none
                warnings.simplefilter("error", TracerWarning)
            _trace()

    def _trace() -> None:
        torch.onnx.export(
            network,
            (example,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE if as_trained else torch.onnx.TrainingMode.EVAL,
            do_constant_folding=not as_trained,
            opset_version=opset,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes={INPUT: dict(axes)} if axes else None,
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
        raise BackendFailed(f"torch.onnx.export failed: {words(_root(reason))}", hint=hint) from reason


def _root(reason: BaseException) -> BaseException:
    """The error behind the exporter's errors, which say how to debug the exporter."""
    while (cause := reason.__cause__ or (None if reason.__suppress_context__ else reason.__context__)) is not None:
        reason = cause
    return reason


def is_ours(path: Path) -> bool:
    """Whether a file is an ONNX file that was written here."""
    if path.suffix != ".onnx":
        return False
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf answers foreign bytes with errors of its own
        return False
    return model.producer_name == PRODUCER or any(item.key.startswith(f"{PRODUCER}.") for item in model.metadata_props)


def _interrupted(reason: BaseException | None) -> bool:
    """Whether Ctrl-C stands behind an error: the exporter wraps whatever reaches it."""
    while reason is not None:
        if isinstance(reason, KeyboardInterrupt):
            return True
        reason = reason.__cause__ or reason.__context__
    return False


def strip(model: onnx.ModelProto) -> None:
    """Remove what exporters write about the machine and the code they ran on: local paths, source lines, notes, times."""
    del model.metadata_props[:]
    model.ClearField("doc_string")
    model.graph.ClearField("doc_string")
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for item in (*graph.value_info, *graph.input, *graph.output, *graph.initializer, *graph.node):
            del item.metadata_props[:]
            item.ClearField("doc_string")
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _name_layers(model: onnx.ModelProto) -> None:
    """Every layer goes by the tensors it holds."""
    model.graph.name = "network"
    weights = {item.name for item in model.graph.initializer}
    named: dict[str, int] = {}
    for node in model.graph.node:
        owner = next((name for name in node.input if name in weights and name.endswith(".weight")), None)
        if owner is not None:
            name = owner.removesuffix(".weight")
            named[name] = named.get(name, 0) + 1  # layers with equal weights share their tensors
            node.name = name if named[name] == 1 else f"{name}.{named[name]}"


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """The TorchScript exporter prints graphs from C++, past Python's standard output, where a JSON document may be expected."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


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

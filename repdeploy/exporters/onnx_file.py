"""Write an ONNX file: torch's exporter, then everything that would differ from machine to machine is taken out.

Source: torch.onnx.export(dynamo=True); ONNX IR specification for metadata_props.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from repdeploy.bundle import replacing
from repdeploy.errors import BackendFailed, RepDeployError
from repdeploy.network import sample_images

PRODUCER = "repdeploy"
INPUT, OUTPUT = "input", "output"
EXAMPLE_BATCH = 2
"""An example batch of 1 would be taken for a constant."""
MAX_BYTES = 1_800_000_000
"""Protobuf ends at 2 GiB; below this the weights stay inside the file."""


def write_onnx(
    network: nn.Module, path: Path, image: tuple[int, int, int], *, batch: int | None, provenance: Mapping[str, str]
) -> int:
    """Write the network; `batch` None keeps the batch dynamic, under the name "batch". Returns the opset read back.

    The file is the same, byte for byte, for the same network. Raises BackendFailed where the exporter or the checker does.
    """
    example = sample_images((EXAMPLE_BATCH if batch is None else batch, *image), seed=0)
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    try:
        with _quiet() as said:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
        if program is None:
            raise BackendFailed("torch.onnx.export returned nothing")
        model = program.model_proto
        _strip(model)
        model.producer_name, model.producer_version = PRODUCER, ""
        for key, value in provenance.items():
            model.metadata_props.add(key=f"repdeploy.{key}", value=value)
        if model.ByteSize() > MAX_BYTES:
            raise BackendFailed(
                f"the ONNX file would have {model.ByteSize() / 1e9:.1f} GB, and one file ends at 1.8",
                hint="export from a machine-readable deploy state dict with your own model until external data is supported",
            )
        onnx.checker.check_model(model, full_check=True)
    except RepDeployError:
        raise
    except Exception as reason:  # the exporter raises whatever its many parts raise
        if _interrupted(reason):
            raise KeyboardInterrupt from reason
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(reason)).split())[:300]
        raise BackendFailed(f"torch.onnx.export failed: {text}", hint=f"it said: {said.getvalue()[-300:]}" if said.getvalue()
                            else "run with --debug for the whole trace") from reason  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    opset: int = next(item.version for item in model.opset_import if item.domain == "")
    return opset


def is_ours(path: Path) -> bool:
    """Whether a file is an ONNX file that was written here."""
    if path.suffix != ".onnx":
        return False
    try:
        producer: str = onnx.load(path, load_external_data=False).producer_name
    except Exception:  # protobuf answers foreign bytes with errors of its own
        return False
    return producer == PRODUCER


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
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        owner = next((name for name in node.input if name in weights and name.endswith(".weight")), None)
        if owner is not None:
            node.name = owner.removesuffix(".weight")


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints progress and warns about its own internals: keep it off the user's screen."""
    said = io.StringIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        logger.setLevel(level)

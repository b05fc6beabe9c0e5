"""An ONNX file as it is read and written here: checked, its weights constants, its functions inlined.

Source: ONNX IR specification (external data, opset imports, initializers that are inputs as well).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from repdeploy.bundle import BENCH, MANIFEST, REFERENCES, SOURCE, WEIGHTS, replacing
from repdeploy.errors import BackendFailed, InputError, UnreadableCheckpoint, words
from repdeploy.gates import PRECISION_BUDGETS
from repdeploy.graph.known import STANDARD

OLDEST_OPSET = 9
"""Below it, batch norms and broadcasting meant something else."""
WEIGHTS_APART = 4
"""The IR version since which weights need not be inputs as well."""
MAX_BYTES = 1_800_000_000
"""Protobuf ends at 2 GiB; below this the weights stay inside the file."""
DATA_SUFFIX = ".data"
"""Behind a model's name: the file beside it that holds its weights."""
RESERVED = frozenset({
    SOURCE, MANIFEST, REFERENCES, BENCH, WEIGHTS,
    *(f"model.{name}.onnx{suffix}" for name in PRECISION_BUDGETS for suffix in ("", DATA_SUFFIX)),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """A model as it lies in a file. `external`: files beside it that hold its weights; `notes`: what reading it changed."""

    path: Path
    model: ir.Model
    external: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def opset(self) -> int:
        return self.model.opset_imports[""]

    @property
    def container(self) -> str:
        producer = f"{self.model.producer_name or ''} {self.model.producer_version or ''}".strip()
        return f"ONNX, opset {self.opset}" + (f", written by {producer}" if producer else "")

    def copy_to(self, target: Path) -> None:
        """The file itself, with what lies beside it, under a name of ours."""
        shutil.copyfile(self.path, target)
        for name in self.external:
            (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path.parent / name, target.parent / name)


def read_onnx(path: Path) -> OnnxSource:
    """Read a model. Raises UnreadableCheckpoint for a damaged file, InputError for what is not supported, with the reason."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as reason:
        raise UnreadableCheckpoint(f"{path.name} cannot be read: {reason.strerror}", hint="check the path") from reason
    except Exception as reason:  # protobuf's DecodeError has no public name
        raise UnreadableCheckpoint(
            f"{path.name} is no ONNX file: {words(reason, 120)}", hint="export it again, or copy it again"
        ) from reason
    if not proto.graph.node:
        raise UnreadableCheckpoint(f"{path.name} holds no graph", hint="export it again, or copy it again")
    external = _external(path, proto)
    if proto.graph.sparse_initializer:
        raise InputError(f"{path.name} holds sparse weights, which are not read here", hint="save it with dense weights")
    versions = {item.domain: item.version for item in proto.opset_import}
    opset = next((versions[domain] for domain in STANDARD if domain in versions), None)
    newest = onnx.defs.onnx_opset_version()
    if opset is None or not OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"{path.name} uses opset {opset}; {OLDEST_OPSET} to {newest} are known here",
            hint="convert it with onnx.version_converter, or export it again",
        )
    try:
        shaped = _with_output_shapes(proto)
        onnx.checker.check_model(str(path) if shaped is None else shaped, full_check=True)
        model = ir.load(path)
    except Exception as reason:  # the checker's and the reader's errors have no base of their own
        raise InputError(
            f"{path.name} is not valid ONNX: {words(reason)}",
            hint="the exporter is to blame: onnx.checker.check_model says the same",
        ) from reason
    if "" not in model.opset_imports:
        model.opset_imports[""] = opset  # it goes by its long name in the file
    notes = []
    if shaped is not None:
        for value, item in zip(model.graph.outputs, shaped.graph.output, strict=True):
            value.shape, value.type = ir.serde.deserialize_type_proto_for_shape(item.type), value.type
    if model.functions:
        InlinePass()(model)
        notes.append("functions of the model were inlined")
    weights = [value.name for value in model.graph.inputs if value.name in model.graph.initializers]
    if weights:
        RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version, WEIGHTS_APART)
        notes.append(f"{len(weights)} stored weights were listed as inputs as well; they are constants now")
    return OnnxSource(path, model, external, tuple(notes))


def write_model(model: ir.Model, path: Path) -> tuple[str, ...]:
    """As `write_proto`."""
    return write_proto(ir.to_proto(model), path)


def write_proto(proto: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write a model, byte for byte the same for the same model; returns the files beside it that hold its weights, of a model
    that one file cannot hold. Raises BackendFailed where it is not valid."""
    if _weights_in(proto) > MAX_BYTES:
        return _write_apart(proto, path)
    require_valid(proto)
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return ()


def _weights_in(proto: onnx.ModelProto) -> int:
    """Bytes of the weights that a model holds itself: protobuf does not measure what it cannot write."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def _write_apart(proto: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """The weights in a file of their own, whose name the model holds: both appear under their final names."""
    data = f"{path.name}{DATA_SUFFIX}"
    onnx.external_data_helper.convert_model_to_external_data(proto, all_tensors_to_one_file=True, location=data)
    (path.parent / data).unlink(missing_ok=True)  # onnx appends to what it finds
    onnx.save_model(proto, path)
    require_valid(str(path))
    return (data,) if (path.parent / data).is_file() else ()


def require_valid(model: onnx.ModelProto | str) -> None:
    """Raises BackendFailed with what onnx's checker says of a model, or of a file. What is too large to be checked in memory
    is checked when it is written."""
    if isinstance(model, onnx.ModelProto) and _weights_in(model) > MAX_BYTES:
        return
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as reason:  # the checker's errors have no base of their own
        raise BackendFailed(f"the graph is not valid ONNX: {words(reason)}") from reason


def _with_output_shapes(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """The same graph with its outputs' shapes, which runtimes do without and the specification wants; None if it has them."""
    if all(item.type.tensor_type.HasField("shape") for item in proto.graph.output):
        return None
    found: onnx.ModelProto = onnx.shape_inference.infer_shapes(proto)
    return found


def _external(path: Path, proto: onnx.ModelProto) -> tuple[str, ...]:
    """The files beside a model that hold its weights. Raises InputError where one is missing or lies elsewhere."""
    needed: dict[str, int] = {}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            entry = onnx.external_data_helper.ExternalDataInfo(tensor)
            end = (entry.offset or 0) + (entry.length or 0)
            needed[entry.location] = max(needed.get(entry.location, 0), end)
    names = sorted(needed)
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{path.name} reads its weights from {name!r}, outside its own folder", hint="save it in one folder"
            )
        if name in RESERVED and name != f"{path.name}{DATA_SUFFIX}":
            raise InputError(f"{path.name} keeps its weights in {name}, a name of a bundle's own files", hint="save it anew")
        if not (path.parent / name).is_file():
            raise InputError(
                f"{path.name} keeps its weights in {name}, which is not beside it", hint="copy both files into one folder"
            )
        if (path.parent / name).stat().st_size < needed[name]:
            raise UnreadableCheckpoint(f"{name} is shorter than the weights of {path.name}", hint="copy it again")
    return tuple(names)

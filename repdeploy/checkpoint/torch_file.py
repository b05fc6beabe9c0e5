"""torch.save files, the zip form (torch 1.6 and later) and the stream before it, read tensor by tensor."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from repdeploy.checkpoint.pickle_machine import ASK, Constructor, Global, Instance, PickleMachine, hashable
from repdeploy.checkpoint.stored import AGAIN, Storage, StoredTensor, stored_view, unreadable
from repdeploy.errors import RepDeployError, UnreadableCheckpoint, UnsafeCheckpoint

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first object of a stream-form file (torch/serialization.py, MAGIC_NUMBER)."""
MAX_PICKLE_BYTES = 256 << 20
MAX_EXPANSION = 200
"""Uncompressed over compressed size of an archive; weights hardly compress, so anything near this is a bomb."""

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def read_zip(path: Path) -> tuple[Any, frozenset[str]]:
    """The object tree of a zip-form file, tensors as StoredTensor, and the classes that were read as inert data."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise UnreadableCheckpoint(
                    f"{path.name} is a zip archive without data.pkl, so torch.save did not write it",
                    hint="give the .pth, .pt, .safetensors or .hdf5 file itself, not an archive around it",
                )
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in entries:
                raise UnreadableCheckpoint(
                    f"{path.name} is a TorchScript program, not a training checkpoint",
                    hint="save model.state_dict() of the training-time model with torch.save",
                )
            if len(entries) != len(archive.infolist()):
                raise UnsafeCheckpoint(f"{path.name} holds two entries of one name", hint=ASK)
            _refuse_bombs(path, entries.values())
            if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise UnsafeCheckpoint(f"the pickle inside {path.name} is larger than {MAX_PICKLE_BYTES >> 20} MiB", hint=ASK)
            program = archive.read(pickles[0])
            order = entries.get(f"{root}byteorder")
            swapped = order is not None and order.file_size <= 16 and archive.read(order) == b"big"
    except RepDeployError:
        raise
    # zipfile answers damage with whatever its struct, decode and seek calls raise
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as reason:
        raise UnreadableCheckpoint(
            f"{path.name} is a damaged zip archive: {' '.join(str(reason).split())}", hint=AGAIN
        ) from reason
    if swapped:
        raise UnreadableCheckpoint(f"{path.name} was saved on a big-endian machine", hint="load and save it there again")

    places: dict[str, int] = {}

    def persistent(reference: Any) -> Storage | Global | UnknownStorage:
        found = _storage_reference(reference)
        if not isinstance(found, tuple):
            return found
        dtype, key, elements = found
        info = entries.get(f"{root}data/{key}")
        if info is None:
            raise UnreadableCheckpoint(f"{path.name} names storage {key!r}, which the archive lacks", hint=AGAIN)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnreadableCheckpoint(
                f"the archive {path.name} is compressed, which torch.save never does", hint="unpack it and give the file inside"
            )
        if info.file_size < elements * dtype.itemsize:
            raise UnreadableCheckpoint(f"storage {key!r} of {path.name} is shorter than it claims", hint=AGAIN)
        if key not in places:
            places[key] = _data_offset(path, info)
        return Storage(path, places[key], elements, dtype)

    machine = PickleMachine(_constructors(), persistent)
    tree = machine.run(io.BytesIO(program))
    return tree, frozenset(machine.inert)


def read_stream(path: Path) -> tuple[Any, frozenset[str]]:
    """The object tree of a stream-form file (before torch 1.6): five pickles, then the storages one after the other."""
    pending: dict[str, _PendingStorage] = {}

    def persistent(reference: Any) -> _PendingStorage | Global | UnknownStorage:
        found = _storage_reference(reference)
        if not isinstance(found, tuple):
            return found
        dtype, key, elements = found
        return pending.setdefault(key, _PendingStorage(dtype, elements))

    with path.open("rb") as program:
        machine = PickleMachine(_constructors(), persistent)
        first = machine.run(program)
        if first != LEGACY_MAGIC:
            raise UnreadableCheckpoint(
                f"{path.name} is a plain pickle, not a file of torch.save",
                hint="load it where it was written and save the state_dict with torch.save",
            )
        PickleMachine({}, persistent).run(program)  # the protocol version
        written_by = PickleMachine({}, persistent).run(program)
        if isinstance(written_by, dict) and written_by.get("little_endian") is False:
            raise UnreadableCheckpoint(f"{path.name} was saved on a big-endian machine", hint="load and save it there again")
        tree = machine.run(program)
        keys = PickleMachine({}, persistent).run(program)
        size = path.stat().st_size
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UnreadableCheckpoint(f"{path.name} does not list its tensors", hint=AGAIN)
        for key in keys:
            header = program.read(8)
            if key not in pending or len(header) < 8:
                raise UnreadableCheckpoint(f"{path.name} ends before its tensors", hint=AGAIN)
            (elements,) = struct.unpack("<q", header)
            storage, start = pending[key], program.tell()
            if elements != storage.elements or start + elements * storage.dtype.itemsize > size:
                raise UnreadableCheckpoint(f"storage {key!r} of {path.name} is cut off", hint=AGAIN)
            storage.placed = Storage(path, start, elements, storage.dtype)
            program.seek(elements * storage.dtype.itemsize, io.SEEK_CUR)
    return tree, frozenset(machine.inert)


class _PendingStorage:
    """A storage of a stream-form file: tensors name it before its place in the file is known."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.dtype, self.elements = dtype, elements
        self.placed: Storage | None = None

    def view(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
        def read() -> torch.Tensor:
            if self.placed is None:
                raise UnreadableCheckpoint("a tensor of this file has no data", hint=AGAIN)
            return stored_view(self.placed, offset, shape, stride).read()

        return StoredTensor(shape, self.dtype, read)


class UnknownStorage:
    """Numbers of a type that is not understood (quantized tensors, for example)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _constructors() -> dict[str, Constructor]:
    def tensor(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        size, step = tuple(map(int, shape)), tuple(map(int, stride))
        if isinstance(storage, UnknownStorage):
            return unreadable(size, f"tensors of type {storage.kind} are not understood")
        if len(rest) > 2 and rest[2]:  # lazily conjugated or negated numbers
            return unreadable(size, "a tensor was saved with its sign still pending")
        if isinstance(storage, _PendingStorage):
            return storage.view(int(offset), size, step)
        return stored_view(storage, int(offset), size, step)

    def typed_tensor(storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, kind: Any, *rest: Any) -> Any:
        dtype = getattr(torch, kind.name, None) if isinstance(kind, Global) and kind.module == "torch" else None
        if not isinstance(dtype, torch.dtype) or not isinstance(storage, Storage):
            return unreadable(tuple(map(int, shape)), f"tensors of type {kind} are not understood")
        return tensor(storage.viewed_as(dtype), offset, shape, stride, grad, hooks, *rest)

    def from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
        known = table.get(str(function))
        return known(*arguments) if known not in (None, from_type) else Instance(Global("torch", "Tensor"))

    def mapping(*items: Any) -> dict[Any, Any]:
        if not items or not isinstance(items[0], list | dict):
            return {}
        pairs = items[0].items() if isinstance(items[0], dict) else items[0]
        return {hashable(key): value for key, value in pairs}

    def listed(*items: Any) -> list[Any]:
        return list(items[0]) if items and isinstance(items[0], list | tuple) else []

    table: dict[str, Constructor] = {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": from_type,
        "torch.Size": lambda *sizes: tuple(sizes[0]) if sizes else (),
        "collections.OrderedDict": mapping,
        "collections.defaultdict": lambda *_: {},
        **dict.fromkeys(("builtins.set", "builtins.frozenset"), listed),
    }
    return table


def _storage_reference(reference: Any) -> tuple[torch.dtype, str, int] | Global | UnknownStorage:
    """('storage', type, key, location, elements[, view]) -> dtype, key, elements; ('module', class, ...) -> the class."""
    if isinstance(reference, tuple) and len(reference) > 1 and reference[0] == "module":
        return reference[1] if isinstance(reference[1], Global) else Global("?", "module")
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        hint = AGAIN if isinstance(reference, tuple) else "it may use pickle protocol 0; save it with the default protocol"
        raise UnreadableCheckpoint("the file refers to its tensors in an unknown way", hint=hint)
    if len(reference) > 5 and reference[5] is not None:
        raise UnreadableCheckpoint(
            "the file was written by torch 0.3 or older, whose views are not understood",
            hint="load and save it with a newer torch",
        )
    kind = reference[1]
    name = kind.name if isinstance(kind, Global) else str(kind)[:80]
    if name not in DTYPES:
        return UnknownStorage(name)
    elements = int(reference[4])
    if not 0 <= elements < 1 << 62:
        raise UnreadableCheckpoint("a storage has an impossible size", hint=AGAIN)
    return DTYPES[name], str(reference[2]), elements


def _refuse_bombs(path: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    size, declared = path.stat().st_size, sum(info.file_size for info in entries)
    if declared > MAX_EXPANSION * size:
        raise UnsafeCheckpoint(
            f"{path.name} unpacks to {declared / size:,.0f} times its size: a zip bomb, not weights. Nothing was unpacked",
            hint="ask the file's author for a plain torch.save or .safetensors file",
        )


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where an uncompressed entry's bytes begin: behind its local header, whose lengths may differ from the directory's."""
    if info.header_offset < 0:
        raise UnreadableCheckpoint(f"{path.name} has a damaged zip directory", hint=AGAIN)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UnreadableCheckpoint(f"{path.name} has a damaged zip directory", hint=AGAIN)
        lengths: tuple[int, int] = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + sum(lengths)

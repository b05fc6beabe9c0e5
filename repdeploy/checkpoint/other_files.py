"""safetensors and HDF5 files: flat tables of named tensors, read one at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeploy.checkpoint.stored import AGAIN, StoredTensor, unreadable
from repdeploy.errors import UnreadableCheckpoint, UnsafeCheckpoint, words

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HDF5_DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"})
HDF5_NOT_TENSORS = frozenset({"deps"})
"""ACNet's and ResRep's writers put the layer widths beside the weights under this name."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")  # kept open: opening reads the whole header again
        table = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(key)
            shape, kind = tuple(part.get_shape()), part.get_dtype()
            if kind in SAFETENSORS_DTYPES:
                table[key] = StoredTensor(shape, SAFETENSORS_DTYPES[kind], partial(file.get_tensor, key))
            else:
                table[key] = unreadable(shape, f"{key} of {path.name} has type {kind}, which is not understood")
        return table
    except SafetensorError as reason:
        raise UnreadableCheckpoint(f"{path.name} is a damaged safetensors file: {reason}", hint=AGAIN) from reason


def read_hdf5(path: Path) -> dict[str, StoredTensor]:
    """One dataset per entry, dots kept, "/" of a name written as "+" (ACNet, DBB and ResRep training engines)."""
    import h5py
    import numpy as np

    table: dict[str, StoredTensor] = {}

    def add(name: str, item: Any) -> None:
        if (
            not isinstance(item, h5py.Dataset)
            or name in HDF5_NOT_TENSORS
            or item.shape is None
            or item.dtype.kind not in "fiub"
        ):
            return
        if item.external or item.is_virtual:
            raise UnsafeCheckpoint(
                f"{name[:80]} of {path.name} keeps its numbers in another file, which is not opened",
                hint="copy the data into the file itself",
            )
        if item.dtype.str[1:] not in HDF5_DTYPES:
            table[name.replace("+", "/")] = unreadable(tuple(item.shape), f"{name[:80]} of {path.name} has type {item.dtype}")
            return
        like = torch.from_numpy(np.empty(0, item.dtype.newbyteorder("=")))
        table[name.replace("+", "/")] = StoredTensor(tuple(item.shape), like.dtype, _Hdf5Reader(path, name))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except _HDF5_DAMAGE as reason:
        raise UnreadableCheckpoint(f"{path.name} is a damaged HDF5 file: {_short(reason)}", hint=AGAIN) from reason
    if any(name.startswith("kernel") and name[6:].isdigit() for name in table):
        raise UnreadableCheckpoint(
            f"{path.name} lists its layers by number (kernel0, gamma0, ...): the names are lost",
            hint="save it again with names (save_hdf5 of the training engine)",
        )
    return table


class _Hdf5Reader:
    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self) -> Tensor:
        import h5py
        import numpy as np

        try:
            with h5py.File(self.path, "r") as file:
                values = np.asarray(file[self.name][()])
        except _HDF5_DAMAGE as reason:
            raise UnreadableCheckpoint(
                f"{self.name[:80]} of {self.path.name} is damaged: {_short(reason)}", hint=AGAIN
            ) from reason
        return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))).reshape(values.shape))


_HDF5_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What h5py answers damage with."""


def _short(reason: Exception) -> str:
    return words(reason, 160)

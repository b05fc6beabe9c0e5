"""safetensors and HDF5 files: flat tables of named tensors, read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repdeploy.checkpoint.stored import StoredTensor
from repdeploy.errors import UnreadableCheckpoint

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
HDF5_NOT_TENSORS = frozenset({"deps"})
"""ACNet's and ResRep's writers put the layer widths beside the weights under this name."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            table = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(key)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UnreadableCheckpoint(
                        f"{key} of {path.name} has type {part.get_dtype()}",
                        hint="save the model in float32, float16 or bfloat16",
                    )
                table[key] = StoredTensor(tuple(part.get_shape()), dtype, _SafetensorsReader(path, key))
            return table
    except SafetensorError as reason:
        raise UnreadableCheckpoint(
            f"{path.name} is a damaged safetensors file: {reason}", hint="copy or download it again"
        ) from reason


class _SafetensorsReader:
    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __call__(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
            return tensor


def read_hdf5(path: Path) -> dict[str, StoredTensor]:
    """One dataset per entry, dots kept, "/" of a name written as "+" (ACNet, DBB and ResRep training engines)."""
    import h5py
    import numpy as np

    table: dict[str, StoredTensor] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name not in HDF5_NOT_TENSORS and item.dtype.kind in "fiub":
            like = torch.from_numpy(np.empty(0, item.dtype.newbyteorder("=")))
            table[name.replace("+", "/")] = StoredTensor(tuple(item.shape), like.dtype, _Hdf5Reader(path, name))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except (OSError, RuntimeError, ValueError) as reason:
        raise UnreadableCheckpoint(
            f"{path.name} is a damaged HDF5 file: {reason}", hint="copy or download it again"
        ) from reason
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

        with h5py.File(self.path, "r") as file:
            values = np.asarray(file[self.name][()])
        return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))).reshape(values.shape))

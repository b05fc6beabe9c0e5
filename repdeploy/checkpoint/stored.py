"""A tensor that still lies in its file: shape and type are known, the numbers are read on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repdeploy.errors import InputError, UnreadableCheckpoint

AGAIN = "the file is truncated or damaged; copy or download it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`read()` brings the tensor into memory, in the stored type; nothing is kept between two reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in a file, which several tensors may view. `offset` and `elements` in elements of `dtype`."""

    path: Path
    start: int
    elements: int
    dtype: torch.dtype

    def viewed_as(self, dtype: torch.dtype) -> Storage:
        """The same bytes as numbers of another type."""
        return Storage(self.path, self.start, self.elements * self.dtype.itemsize // dtype.itemsize, dtype)

    def slice(self, offset: int, elements: int) -> Tensor:
        """A flat tensor (elements,) read from the file. Raises UnreadableCheckpoint where the file ends too early."""
        if elements == 0:
            return torch.empty(0, dtype=self.dtype)
        values = torch.empty(elements, dtype=self.dtype)
        view, position = values.view(torch.uint8).numpy().data, self.start + offset * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view], position)
                if count == 0:
                    raise UnreadableCheckpoint(
                        f"{self.path.name} ends inside a tensor ({len(view)} bytes are missing)",
                        hint=AGAIN,
                    )
                view, position = view[count:], position + count
        return values


def stored_view(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
    """A tensor that views a storage. Raises UnreadableCheckpoint where it would reach outside."""
    if max((offset, *shape, *stride), default=0) >= 1 << 62 or len(shape) != len(stride):
        raise UnreadableCheckpoint(f"a tensor of {storage.path.name} has an impossible shape", hint=AGAIN)
    elements = math.prod(shape)
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if elements else 0
    if min((offset, *shape, *stride), default=0) < 0 or offset + span > storage.elements:
        raise UnreadableCheckpoint(
            f"a tensor of shape {shape} reaches outside its storage of {storage.elements} elements in {storage.path.name}",
            hint=AGAIN,
        )

    def read() -> Tensor:
        return storage.slice(offset, span).as_strided(shape, stride)

    return StoredTensor(shape, storage.dtype, read)


def unreadable(shape: tuple[int, ...], reason: str) -> StoredTensor:
    """A tensor that is known to be there but cannot be read here: an error only for whoever needs it."""

    def read() -> Tensor:
        raise InputError(reason, hint="save the model in float32, float16 or bfloat16")

    return StoredTensor(shape, torch.float32, read)

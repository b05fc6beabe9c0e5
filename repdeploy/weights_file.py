"""Write a .safetensors file tensor by tensor, so that a network never has to be in memory twice.

Format: eight bytes of header length, a JSON header, then the tensors (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from repdeploy.checkpoint.other_files import SAFETENSORS_DTYPES
from repdeploy.errors import UsageError

NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_WAITING = 6
"""Tensors that may wait for the disk: writing and hashing overlap with the next block's fusion."""


class WeightsWriter:
    """Write the tensors of a table in its order; `sha256` is known once the `with` block ends.

    Raises UsageError where the disk refuses, ValueError where a tensor is not the one the table announced.
    """

    def __init__(self, path: Path, table: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.path, self.sha256 = path, ""
        self._expected = list(table.items())
        self._queue: queue.Queue[bytes | memoryview | None] = queue.Queue(MAX_WAITING)
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._drain, daemon=True)
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        entries: dict[str, object] = {**header}
        for key, (shape, dtype) in self._expected:
            size = dtype.itemsize * torch.Size(shape).numel()
            entries[key] = {"dtype": NAMES.get(dtype, "?"), "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text

    def write(self, key: str, tensor: Tensor) -> None:
        """The next tensor of the table, in the announced shape and dtype."""
        if self._failure is not None:
            raise _refused(self.path, self._failure)
        expected, (shape, dtype) = self._expected.pop(0)
        if key != expected or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"expected {expected} {shape} {dtype}, got {key} {tuple(tensor.shape)} {tensor.dtype}")
        flat = tensor.contiguous().reshape(-1)
        if flat.numel():
            self._queue.put(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        self._thread.start()
        self._queue.put(self._head)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise _refused(self.path, self._failure)
        if kind is None and self._expected:
            raise ValueError(f"{self._expected[0][0]} was announced and never written")

    def _drain(self) -> None:
        digest = hashlib.sha256()
        try:
            with self.path.open("wb", buffering=0) as file:
                while (piece := self._queue.get()) is not None:
                    digest.update(piece)
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[file.write(rest) :]
        except OSError as reason:
            self._failure = reason
            while self._queue.get() is not None:  # let the writer finish and see the failure
                pass
        self.sha256 = digest.hexdigest()


def _refused(path: Path, reason: OSError) -> UsageError:
    return UsageError(f"{path.parent} cannot be written: {reason.strerror}", hint="free some space or give another -o")

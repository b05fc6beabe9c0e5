"""SHA-256 of files, in the background where there is something else to do: hashing releases the interpreter."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from repdeploy.errors import UsageError


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digest:
    """The SHA-256 of a file, computed from now on. Torch takes a second to import: start this first."""

    def __init__(self, path: Path) -> None:
        self._path, self._value = path, ""
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._value = digest(self._path)
        except OSError as reason:
            self._error = reason

    def result(self) -> str:
        """Wait for it. Raises UsageError where the file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise UsageError(f"{self._path} cannot be read: {self._error.strerror}", hint="check the path and its permissions")
        return self._value

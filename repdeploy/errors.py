"""Every error a user can meet. Each carries its exit status and two lines: what happened, and what to do.

Exit statuses: 2 usage, 3 input not understood, 4 verification failed, 5 a backend is missing, 6 a backend failed.
Anything that is not a RepDeployError is a bug of ours (status 1).
"""

from __future__ import annotations

import re


class RepDeployError(Exception):
    """What happened and what was expected (`str(error)`), and what to do about it (`error.hint`)."""

    exit_status = 1
    usual_hint = "run repdeploy doctor to see what is installed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class UsageError(RepDeployError):
    """Flags, a missing file, an existing bundle of another source, an unwritable output."""

    exit_status = 2
    usual_hint = "--help lists what each command takes"


class UnknownFamily(UsageError):
    """No installed plugin has that name."""


class UnknownFact(UsageError):
    """`--set` names a fact that nothing here reads."""


class InputError(RepDeployError):
    """The contents of the input are not understood, not finite, or ambiguous."""

    exit_status = 3
    usual_hint = "run repdeploy inspect on the checkpoint to see what it holds"


class UnreadableCheckpoint(InputError):
    """The file is damaged, truncated or not a checkpoint."""


class UnsafeCheckpoint(InputError):
    """Reading the file the usual way would run code, or exhaust the machine. Nothing of it was executed."""


class NotRecognised(InputError):
    """No family, or no skeleton, describes these tensors."""


class IllegalInput(InputError):
    """The network cannot take an image of this shape, or would mean something else on it.

    `fits`: height and width of an image that it takes, where the network itself tells.
    """

    def __init__(self, message: str, *, hint: str = "", fits: tuple[int, int] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.fits = fits


class CannotSqueeze(InputError):
    """An expression that equals no single convolution; the message carries the numbers."""


class VerificationFailed(RepDeployError):
    """A gate found a difference above its budget."""

    exit_status = 4
    usual_hint = "please report this with the numbers above"


class BackendMissing(RepDeployError):
    """A library or a device is not here."""

    exit_status = 5


class BackendFailed(RepDeployError):
    """A library that is here reported an error."""

    exit_status = 6
    usual_hint = "run again with --debug for the whole trace"


def words(reason: object, most: int = 300) -> str:
    """What a library said, as part of a sentence of ours: on one line, without colours, not longer than `most` characters."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(reason)).split())[:most]

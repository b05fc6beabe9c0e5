"""Images of the user's own for the overflow guard: what the gates run on is noise, and real images may reach further."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from repdeploy.errors import InputError, UsageError

HINT = "np.savez('sample.npz', input=x.numpy()): images as the network takes them, float32"
AT_ONCE = 8
"""Images that are run together."""


def sample_images(path: Path, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The array `input` of an .npz, in batches. `shape`: (batch, channels, height, width) of the export.

    Raises UsageError where there is no file, InputError where it holds no such images.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint=HINT)
    try:
        with np.load(path, allow_pickle=False) as content:
            images = np.asarray(content["input"], np.float32)
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError) as reason:
        raise InputError(f"--sample {path.name} is no .npz with an array 'input': {reason}", hint=HINT) from reason
    if images.ndim != 4 or images.shape[1:] != shape[1:] or not len(images) or not np.isfinite(images).all():
        raise InputError(
            f"--sample {path.name}: input has shape {images.shape}, expected finite images of "
            f"{'x'.join(map(str, ('N', *shape[1:])))}",
            hint=HINT,
        )
    return [images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]

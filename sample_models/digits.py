"""The handwritten digits bundled with scikit-learn (UCI Optical Recognition of Handwritten Digits, test part).

1797 grey images of 8x8 pixels, enlarged (to 16x16 by default) so that a network has something to stride over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16
TEST_IMAGES = 360
MEAN, STD = 0.306, 0.319
"""Of the training images, after scaling to 0 .. 1."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (count, 1, side, side) float32, normalised; labels (count,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(side: int = SIDE) -> Digits:
    """The same split every time; images enlarged to `side` pixels."""
    from sklearn.datasets import load_digits as bundled

    raw = bundled()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    images = (images - MEAN) / STD
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])

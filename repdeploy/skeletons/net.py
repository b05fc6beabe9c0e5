"""Networks are written once, as define-by-run functions over slots: `net.at("stage1.0", x, stride=2)`.

A skeleton knows no block kind and a block knows no network. The same function runs on shapes only (recognition), on
the training-time expressions, and on the squeezed convolutions. Strides, pooling windows, activations and
squeeze-excite belong to the skeleton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Net(Protocol):
    """What a skeleton sees of a network. Images are (batch, channels, height, width)."""

    def at(self, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
        """The block at a slot, whatever it is made of."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A fully connected layer: (batch, in) -> (batch, out)."""

    def __contains__(self, name: str) -> bool:
        """Whether anything is stored under that name."""

    def children(self, name: str) -> tuple[str, ...]:
        """The numbered slots under a name, in numerical order: "stage1" -> ("stage1.0", "stage1.1")."""

    def drop(self, name: str, reason: str) -> None:
        """What lies under that name serves training only and is left out of the deploy network."""

    def pooled(self, x: Tensor) -> Tensor:
        """Note that x is the last map, in front of the head's pooling, and return it."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A network over slots. `stems`: the names its first slot may have, whose kernel tells the image's channels;
    `side`: height and width of the images it was published for."""

    name: str
    forward: Callable[[Net, Tensor], Tensor]
    stems: tuple[str, ...]
    side: int = 224

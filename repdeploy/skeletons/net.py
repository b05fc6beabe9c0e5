"""Networks are written once, as define-by-run functions over slots: `net.at("stage1.0", x, stride=2)`.

A skeleton knows no block kind and a block knows no network. The same function runs on shapes only (recognition), on
the training-time expressions, and on the squeezed convolutions. Strides, pooling windows, activations and
squeeze-excite belong to the skeleton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from repdeploy.algebra import Pair
from repdeploy.errors import NotRecognised
from repdeploy.facts import FactKind


class Net(Protocol):
    """What a skeleton sees of a network. Images are (batch, channels, height, width)."""

    def at(
        self,
        name: str,
        x: Tensor,
        *,
        stride: int = 1,
        padding: int | None = None,
        before: str | None = None,
        behind: str | None = None,
        tile: Pair | None = None,
    ) -> Tensor:
        """The block at a slot, whatever it is made of, between what is called `before` and `behind`, where it has it: batch
        norms, or factors per channel.

        `padding`: of its largest kernel, where that is not half the kernel; with a norm before it, there must be none. `tile`:
        height and width of the tile that is stored in the channels of each place.
        """

    def norm(self, name: str, x: Tensor, *, why: str) -> Tensor:
        """A batch norm that stands alone, and why no convolution of its own precedes it."""

    def linear(self, name: str, x: Tensor, *, before: str | None = None) -> Tensor:
        """A fully connected layer, behind the batch norm called `before`, where it has one: (batch, in) -> (batch, out)."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor that the training-time and the deploy network have in common. Raises NotRecognised."""

    def fact(
        self,
        name: str,
        convention: Any,
        *,
        fits: Callable[[Any], bool] = lambda value: True,
        image_says: str = "",
        question: str = "",
    ) -> Any:
        """A fact of the whole network that no tensor tells (see Skeleton.facts), by convention unless somebody states it.

        What only the file's own name for its architecture says is not taken where it does not fit. `image_says`: where the
        convention follows from the image, what the image allows. Where the convention is None, or follows from an image that
        nobody chose, the `question` is put to the user: raises InputError.
        """

    def __contains__(self, name: str) -> bool:
        """Whether anything is stored under that name."""

    def children(self, name: str, prefix: str = "") -> tuple[str, ...]:
        """The numbered slots of a stage, in numerical order: "stage1" -> ("stage1.0", "stage1.1"), or with the prefix
        "block" ("stage1.block0", ...)."""

    def drop(self, name: str, reason: str) -> None:
        """What lies under that name serves training only and is left out of the deploy network."""

    def pooled(self, x: Tensor) -> Tensor:
        """Note that x is the last map, in front of the head's pooling, and return it."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A network over slots. `stems`: the names its first slot may have, whose kernel tells the image's channels;
    `side`: height and width of the images it was published for; `facts`: what `Net.fact` may be asked for; `activations`:
    what torch calls the ones it applies; `one_resolution`: why an exported graph takes images of one size only."""

    name: str
    forward: Callable[[Net, Tensor], Tensor]
    stems: tuple[str, ...]
    side: int = 224
    facts: tuple[FactKind, ...] = ()
    activations: tuple[str, ...] = ("ReLU",)
    one_resolution: str = ""


def refusing(skeleton: Skeleton, names: Iterable[str], why: str) -> Skeleton:
    """The same network, except where one of these names is stored: then it is another one, for the reason given."""
    telling = tuple(names)

    def forward(net: Net, x: Tensor) -> Tensor:
        found = next((name for name in telling if name in net), None)
        if found is not None:
            raise NotRecognised(f"{found} is there: {why}")
        return skeleton.forward(net, x)

    return replace(skeleton, forward=forward)


@dataclass(frozen=True, slots=True)
class Architecture:
    """An official variant: slots and last width per stage (what a skeleton asks the `children` of; any other slot is a
    stage of its own); the largest number of groups that is no depthwise one; facts it settles; `skeleton`: the name of its
    network, where others of the family have the same shapes."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    skeleton: str = ""

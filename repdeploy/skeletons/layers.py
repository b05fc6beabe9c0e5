"""What skeletons share between their slots: a convolution with its squeeze-excite, residual sums, the averaging head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import IllegalInput, InputError, NotRecognised
from repdeploy.facts import FactKind, positive_int
from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.net import Net

GLOBAL = "global"


def _window(text: str) -> int | str:
    return GLOBAL if text == GLOBAL else positive_int(text)


WINDOW = FactKind("window", _window, "side of the window that the head averages over, or global, for example window=7")


def required(net: Net, *names: str) -> None:
    """Raises InputError where something is missing that every network of this kind has."""
    for name in names:
        if name not in net:
            raise InputError(
                f"{name} is missing, without which this is another network", hint="save the whole state dict again"
            )


def layer(net: Net, name: str, x: Tensor, *, stride: int = 1, padding: int | None = None) -> Tensor:
    """The slot, then the squeeze-excite that ACNet's builder puts behind a layer when one is configured."""
    x = net.at(name, x, stride=stride, padding=padding)
    if f"{name}.se" in net:
        x = squeeze_excite(net, f"{name}.se", x, reduce="down", expand="up", square_window=True)
    return x


def summed(name: str, branch: Tensor, shortcut: Tensor) -> Tensor:
    """A residual sum. Raises NotRecognised where the two maps differ: then it is another network."""
    if branch.shape[1:] != shortcut.shape[1:]:
        raise NotRecognised(
            f"the branch and the shortcut of {name} give maps of {_times(branch)} and {_times(shortcut)}, which cannot be added"
        )
    return branch + shortcut


def averaged(net: Net, x: Tensor, head: str, *, window: int | str | None = None, step: int | None = None) -> Tensor:
    """The last map, averaged, and the fully connected head.

    `window`: None where the average is over the whole map in any case; else what it is by convention, a fact that may be
    stated otherwise. Fixed windows are `step` apart, by default side by side. Raises IllegalInput where a fixed window does
    not fit. On a larger map such a head reads its top left window only, as the original code does; where there is room for a
    second one, its fully connected layer refuses.
    """
    x = net.pooled(x)
    side = GLOBAL if window is None else net.fact(WINDOW.name, window)
    if not isinstance(side, int):
        return net.linear(head, x.mean((2, 3)))
    if min(x.shape[2:]) < side:
        raise IllegalInput(
            f"the head averages over a fixed window of {side}x{side}, the last map is {x.shape[2]}x{x.shape[3]}",
            hint="use a larger image, or state another head with --set window=global",
        )
    return net.linear(head, F.avg_pool2d(x, side, step or side).flatten(1))


def _times(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))

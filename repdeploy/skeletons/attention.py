"""Squeeze-and-excitation (arXiv:1709.01507) as the re-parameterization repositories write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import IllegalInput
from repdeploy.skeletons.net import Net


def squeeze_excite(
    net: Net,
    name: str,
    x: Tensor,
    *,
    reduce: str,
    expand: str,
    square_window: bool = False,
    gate: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """x times a gate per channel.

    `square_window`: RepVGG's own code averages over a square window of side W at the top left, not over the whole map;
    on H > W the rest of the rows never enters. Raises IllegalInput where that code fails or changes its meaning.
    """
    height, width = x.shape[2:]
    if square_window and not width <= height < 2 * width:
        raise IllegalInput(
            f"{name} averages over a square of the map's width, which a {height}x{width} map does not allow",
            hint="use an image at least as high as wide, and less than twice as high",
        )
    squeezed = (x[:, :, :width] if square_window and height > width else x).mean((2, 3), keepdim=True)
    return x * gate(net.at(f"{name}.{expand}", F.relu(net.at(f"{name}.{reduce}", squeezed))))

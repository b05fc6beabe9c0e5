"""RepMLPNet (arXiv:2112.11081, section 3): every unit mixes the places of square or oblong tiles, then the channels.

The tiles cut each stage's map without a rest, so the network takes the sizes whose maps are multiples of them; how many tiles
there are is counted anew for every image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy.algebra import Pair
from repdeploy.errors import IllegalInput, InputError, NotRecognised
from repdeploy.facts import FactKind
from repdeploy.skeletons.layers import required, summed
from repdeploy.skeletons.net import Net, Skeleton

LARGEST_SIDE = 4096
"""Images that are looked at to name a legal size."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Height and width of the tiles, stage by stage."""

    tiles: tuple[Pair, ...]

    def __str__(self) -> str:
        return ",".join(f"{height}x{width}" for height, width in self.tiles)


def partition(text: str) -> Partition:
    """`16x15,8x7` -> a Partition. Raises ValueError."""
    tiles = []
    for part in text.lower().split(","):
        height, width = map(int, part.split("x"))
        if min(height, width) < 1:
            raise ValueError("sizes of at least 1")
        tiles.append((height, width))
    return Partition(tuple(tiles))


PARTITION = FactKind("partition", partition, "height and width of RepMLP's tiles, stage by stage: partition=16x15,8x7,4x3,2x1")


def square(positions: int) -> Pair | None:
    """The tile that positions are read as where nobody says otherwise."""
    side = math.isqrt(positions)
    return (side, side) if side * side == positions else None


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    stages = net.children("stages")
    if not stages or "conv_embedding" not in net or f"{stages[0]}.0.repmlp_block" not in net:
        raise NotRecognised("no conv_embedding and stages.0.0.repmlp_block")
    embedding = net.shape("conv_embedding.conv.weight")
    if len(embedding) != 4 or embedding[2] != embedding[3] or not embedding[2]:
        raise InputError(f"conv_embedding.conv.weight has shape {embedding}; expected a square kernel")
    patch = embedding[2]
    positions = [_connected(net, f"{stage}.0.repmlp_block")[1] for stage in stages]
    tiles = _tiles(net, (x.shape[2], x.shape[3]), patch, positions)
    x = F.relu(net.at("conv_embedding", x, stride=patch, padding=0))
    for index, (stage, tile) in enumerate(zip(stages, tiles, strict=True)):
        for name in net.children(stage):
            x = unit(net, name, x, tile)
        if index + 1 < len(stages):
            x = F.relu(net.at(f"embeds.{index}", x, stride=2, padding=0))
    return net.linear("head", net.pooled(x).mean((2, 3)), before="head_norm")


def _tiles(net: Net, image: Pair, patch: int, positions: list[int]) -> tuple[Pair, ...]:
    """Per stage; by convention square where their places are a square number, else what the image leaves as the only choice.

    Raises IllegalInput for an image that they do not cut without a rest.
    """
    maps = [(image[0] // (patch << stage), image[1] // (patch << stage)) for stage in range(len(positions))]
    fitting = [_splits(number, size) for number, size in zip(positions, maps, strict=True)]
    only = [found[0] if len(found) == 1 else None for found in fitting]
    usual = [square(number) or tile for number, tile in zip(positions, only, strict=True)]
    told_by_image = None in map(square, positions)
    places = ", ".join(map(str, positions))
    known = tuple(tile for tile in usual if tile is not None)
    choices = "; ".join(
        f"stage {stage}: "
        + (", ".join(f"{height}x{width}" for height, width in found) or f"none of {number} places")
        + f" divide{'s' if not found else ''} a {size[0]}x{size[1]} map"
        for stage, (number, size, found) in enumerate(zip(positions, maps, fitting, strict=True))
    )
    chosen: Partition = net.fact(
        PARTITION.name,
        Partition(known) if len(known) == len(positions) else None,
        image_says=choices if told_by_image else "",
        fits=lambda stated: _belongs(stated, positions),
        question=f"the weights tell how many places a tile has (stage by stage {places}), not its height and width",
    )
    if not _belongs(chosen, positions):
        raise InputError(
            f"its tiles have {places} places, stage by stage, which partition={chosen} contradicts",
            hint="state one tile per stage, in their order, for example partition=16x15,8x7,4x3,2x1",
        )
    for stage, ((height, width), size) in enumerate(zip(chosen.tiles, maps, strict=True)):
        if min(size) < 1 or size[0] % height or size[1] % width:
            legal = _legal(patch, chosen.tiles)
            raise IllegalInput(
                f"stage {stage} works on tiles of {height}x{width}, which do not divide its {size[0]}x{size[1]} map",
                hint=(f"the smallest legal image is {legal[0]}x{legal[1]}; " if legal else "")
                + "other tiles are stated with convert --set partition=",
                fits=legal,
            )
    return chosen.tiles


def _belongs(chosen: Partition, positions: list[int]) -> bool:
    return [height * width for height, width in chosen.tiles] == positions


def _connected(net: Net, block: str) -> Pair:
    """Sets of weights, and places of a tile, by the shape of fc3."""
    shape = net.shape(f"{block}.fc3.weight")
    if len(shape) != 4 or not shape[1] or not shape[0] or shape[0] % shape[1] or shape[2:] != (1, 1):
        raise InputError(
            f"{block}.fc3.weight has shape {shape}; expected (sets * places, places, 1, 1)",
            hint="the file is damaged, or its layers were changed by hand",
        )
    return shape[0] // shape[1], shape[1]


def _splits(positions: int, size: Pair) -> list[Pair]:
    """The tiles of that many places that divide a map."""
    heights = (height for height in range(1, positions + 1) if positions % height == 0)
    split = ((height, positions // height) for height in heights)
    return [(height, width) for height, width in split if min(size) and size[0] % height == 0 and size[1] % width == 0]


def _legal(patch: int, tiles: tuple[Pair, ...]) -> Pair | None:
    """The smallest image whose maps the tiles divide."""

    def divides(side: int, axis: int) -> bool:
        maps = [side // (patch << stage) for stage in range(len(tiles))]
        return all(size and size % tile[axis] == 0 for size, tile in zip(maps, tiles, strict=True))

    smallest = [next(side for side in count(1) if side > LARGEST_SIDE or divides(side, axis)) for axis in (0, 1)]
    return None if max(smallest) > LARGEST_SIDE else (smallest[0], smallest[1])


def unit(net: Net, name: str, x: Tensor, tile: Pair) -> Tensor:
    x = summed(name, block(net, name, x, tile), x)
    inside = F.gelu(net.at(f"{name}.ffn_block.ffn_fc1", x, before=f"{name}.prebn2"))
    return summed(name, net.at(f"{name}.ffn_block.ffn_fc2", inside), x)


def block(net: Net, name: str, x: Tensor, tile: Pair) -> Tensor:
    """Tiles become rows that share `sets` sets of weights; what comes back is multiplied by a gate per channel."""
    inside, norm = f"{name}.repmlp_block", f"{name}.prebn1"
    (sets, positions), (batch, channels, height, width) = _connected(net, inside), x.shape
    if channels % sets:
        raise NotRecognised(f"{inside}.fc3 has {sets} sets of weights for {channels} channels")
    before: str | None = norm
    if sets != channels:
        before, x = None, net.norm(norm, x, why="its channels share the weights behind it, which differ per channel")
    required(net, f"{inside}.gp.fc1.bias", f"{inside}.gp.fc2.bias")
    gate = F.relu(net.at(f"{inside}.gp.fc1", x.mean((2, 3), keepdim=True), before=before))
    gate = torch.sigmoid(net.at(f"{inside}.gp.fc2", gate))
    (down, across), sharing = (height // tile[0], width // tile[1]), channels // sets
    tiles = x.reshape(batch, channels, down, tile[0], across, tile[1]).permute(0, 2, 4, 1, 3, 5)
    mixed = net.at(inside, tiles.reshape(batch * down * across * sharing, sets * positions, 1, 1), before=before, tile=tile)
    # not the order they were cut in: the official code views the same memory under another leading split
    mixed = mixed.reshape(batch * sharing, down, across, sets, *tile).permute(0, 3, 1, 4, 2, 5)
    return mixed.reshape(batch, channels, height, width) * gate


REP_MLP = Skeleton(
    "rep_mlp",
    forward,
    ("conv_embedding",),
    facts=(PARTITION,),
    activations=("ReLU", "GELU", "Sigmoid"),
    one_resolution="the number of RepMLP's tiles is written into the graph",
)

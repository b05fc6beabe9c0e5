"""RepMLP: a fully connected layer over the places of a tile, and convolutions that injection turns into matrices.

fc3' = BN(fc3(x)) + MATRIX(BN(conv1x1(x)) + BN(conv3x3(x)) + ...), on tiles of h x w places, zero outside each tile

The block of 2021 has no share sets: its layers connect all channels of a tile.
"""

from __future__ import annotations

from functools import reduce

from repdeploy.algebra import AsMatrix, Linear, Pair
from repdeploy.blocks import pair
from repdeploy.errors import InputError
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import PARTITION, REP_MLP, Architecture, Partition, square


def share_sets(block: Block) -> Linear:
    """2022: one set of weights for every S-th channel; the norm and the convolutions have a channel per set."""
    rows, positions = block.kernel_shape("fc3.weight")[:2]
    normed = connected(block) >> block.norm("fc3_bn").repeated(positions)
    return injected(block, normed, rows // positions, positions)


def all_channels(block: Block) -> Linear:
    """2021: the norm has a channel per place, the convolutions are dense or grouped."""
    rows = block.kernel_shape("fc3.weight")[0]
    normed = connected(block) >> block.norm("fc3_bn")
    local = block.parts("repconv")
    outputs = block.kernel_shape(f"{local[0]}.conv.weight")[0] if local else 1
    return injected(block, normed, block.groups, rows // outputs)


def connected(block: Block) -> Linear:
    """fc3 as it is trained: without a bias, which only the injected layer has."""
    if "fc3.bias" in block:
        raise InputError(
            f"{block.path('fc3.bias')} stands beside the norm it was injected with: only one of the two forms can be right",
            hint="save the state dict of the training-time model, or of the deploy model, not of both",
        )
    return block.conv("fc3", padding=0)


def injected(block: Block, normed: Linear, groups: int, positions: int) -> Linear:
    """With the convolutions of the local perceptron, where there are some."""
    branches: list[Linear] = []
    for part in block.parts("repconv"):
        half = block.kernel_shape(f"{part}.conv.weight")[2] // 2
        conv = block.conv(f"{part}.conv", stride=1, padding=half, groups=groups)
        branches.append(conv >> block.norm(f"{part}.bn"))
    return normed + AsMatrix(reduce(Linear.__add__, branches), tile_of(block, positions)) if branches else normed


def tile_of(block: Block, positions: int) -> Pair:
    """As the network says; without one, as stated, or square. Raises InputError where nothing tells."""
    if block.place.tile is not None:
        return block.place.tile

    def fitting(chosen: Partition) -> set[Pair]:
        return {(height, width) for height, width in chosen.tiles if height * width == positions}

    usual, facts = square(positions), block.facts.without_hints(PARTITION.name, lambda stated: bool(fitting(stated)))
    if usual is None and facts.stated(block.name, PARTITION.name) is None:
        raise InputError(
            f"{block.name or 'the block'}: its tiles have {positions} places, and nothing tells their height and width",
            hint="state them: --set partition=HEIGHTxWIDTH",
        )
    convention = Partition((usual,) if usual else ())
    chosen = facts.resolve(block.name, PARTITION.name, convention=convention, origin=block.place.origin)
    block.facts.absorb(facts)
    if len(tiles := fitting(chosen)) != 1:
        raise InputError(
            f"{block.name or 'the block'}: its tiles have {positions} places; partition={chosen} does not tell them",
            hint="state one tile of that many places: --set partition=HEIGHTxWIDTH",
        )
    return tiles.pop()


def set_inputs(block: Block) -> int:
    """2022: as many as outputs."""
    return block.kernel_shape("fc3.weight")[0]


def dense_inputs(block: Block) -> int:
    """2021: as many channels come in as go out, unless the norm behind the pooling says otherwise."""
    rows, within = block.kernel_shape("fc3.weight")[:2]
    local = block.parts("repconv")
    if not local:
        return within
    outputs, narrow = block.kernel_shape(f"{local[0]}.conv.weight")[:2]
    channels = block.shape("avg.bn.running_mean")[0] if "avg.bn" in block else outputs
    if rows % outputs or within != narrow * (rows // outputs):
        raise InputError(f"{block.path('fc3.weight')} and the convolutions beside it have different places or groups")
    return channels * (rows // outputs)


def pooled(block: Block) -> Linear:
    """2021's global perceptron: the norm behind the average of each tile, then a layer over all tiles and channels."""
    norm, layer = block.norm("avg.bn"), block.conv("fc1_fc2.fc1")
    return norm.repeated(layer.in_channels // norm.channels) >> layer


def fits_sets(block: Block) -> bool:
    """Whether fc3's norm has one channel per set of weights."""
    shape = block.shape("fc3.weight")
    return len(shape) == 4 and norm_channels(block) * shape[1] == shape[0]


def fits_channels(block: Block) -> bool:
    """Whether fc3's norm has one channel per row."""
    shape = block.shape("fc3.weight")
    return len(shape) == 4 and norm_channels(block) == shape[0] and not fits_sets(block)


def norm_channels(block: Block) -> int:
    """Of fc3's norm, by any tensor that is left of it; 0 where there is none."""
    left = (f"fc3_bn.{part}" for part in ("running_mean", "running_var", "weight", "bias"))
    return next((block.shape(part)[0] for part in left if block.holds(part) and block.shape(part)), 0)


def variant(channels: tuple[int, ...], depths: tuple[int, ...], tiles: str, sets: int) -> Architecture:
    """Table 2: an embedding in front of every stage."""
    one, two, three, four = channels
    return Architecture(
        (1, depths[0], 1, depths[1], 1, depths[2], 1, depths[3]),
        (one, one, two, two, three, three, four, four),
        sets,
        {PARTITION.name: PARTITION.parse(tiles)},
    )


T, B, D = (64, 128, 256, 512), (96, 192, 384, 768), (80, 160, 320, 640)
AT_224, AT_256 = "56x56,28x28,14x14,7x7", "64x64,32x32,16x16,8x8"

FAMILY = Family(
    name="repmlp",
    title="fc3-BN + MATRIX(1x1-BN + 3x3-BN)",
    source="arXiv:2112.11081, section 3.3; arXiv:2105.01883; DingXiaoH/RepMLP",
    # all other layers stay beside their norms in the official deploy model
    kinds=(
        BlockKind("fc3.weight", "fc3", share_sets, set_inputs, fits_sets, fits_fused=lambda block: "gp.fc1" in block),
        BlockKind("fc3.weight", "fc3", all_channels, dense_inputs, fits_channels, ordinary_name=True, one_of_several=True),
        BlockKind(
            "fc1_fc2.fc1.weight",
            "fc1_fc2.fc1",
            pooled,
            fits=lambda block: "avg.bn" in block,
            one_of_several=True,
            is_dense=True,
        ),
        pair("conv", "bn"),
    ),
    skeletons=(REP_MLP,),
    architectures={
        "RepMLPNet-T224": variant(T, (2, 2, 6, 2), AT_224, 128),
        "RepMLPNet-T256": variant(T, (2, 2, 6, 2), AT_256, 128),
        "RepMLPNet-B224": variant(B, (2, 2, 12, 2), AT_224, 128),
        "RepMLPNet-B256": variant(B, (2, 2, 12, 2), AT_256, 128),
        "RepMLPNet-D256": variant(D, (2, 2, 18, 2), AT_256, 128),
        "RepMLPNet-L256": variant(B, (2, 2, 18, 2), AT_256, 256),
    },
    containers="{model, ema, config, ...}, {state_dict}, bare",
)

"""ResRep: a convolution, its norm and a compactor, a 1x1 convolution whose rows training drives to zero one by one.

pre = compactor(BN(conv(x))); a row whose norm is below a threshold leaves the network, and what read it is narrowed
"""

from __future__ import annotations

import torch
from torch import Tensor

from repdeploy.algebra import Linear
from repdeploy.blocks import pair
from repdeploy.errors import InputError
from repdeploy.facts import FactKind, number_from_zero
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import (
    BOTTLENECK_7X7,
    CIFAR_RESNET,
    LENET,
    MOBILENET_7X7,
    RESNET_7X7,
    VGG,
    VGG_16,
    cifar_resnet,
    mobilenet_v1,
    resnet_variants,
)

COMPACTOR = "compactor.pwc"


THRESHOLD = FactKind(
    "threshold", number_from_zero, "at least 0: the L2 norm below which a compactor's row leaves the network, threshold=1e-5"
)


def describe(block: Block) -> Linear:
    outputs, shape = block.kernel_shape("conv.weight")[0], block.kernel_shape(f"{COMPACTOR}.weight")
    if shape != (outputs, outputs, 1, 1):
        raise InputError(
            f"{block.path(COMPACTOR)}.weight has shape {shape}; a compactor maps the {outputs} outputs of its convolution to "
            "as many"
        )
    if f"{COMPACTOR}.bias" in block:
        raise InputError(f"{block.path(COMPACTOR)}.bias is there; a compactor has none, and a row at zero would not be silent")
    return block.conv("conv") >> block.norm("bn") >> block.conv(COMPACTOR, stride=1, padding=0, groups=1)


def gives_up(block: Block) -> tuple[Tensor, str]:
    """Section 3.4: rows below the threshold; of a compactor without any other its largest row stays. The mask means nothing."""
    threshold = block.facts.resolve(block.name, THRESHOLD.name, convention=1e-5, origin=block.place.origin)
    norms = torch.linalg.vector_norm(block.tensor(f"{COMPACTOR}.weight"), dim=(1, 2, 3))
    rows = norms < threshold
    if not bool(rows.all()):
        return rows, ""
    largest = int(norms.argmax())
    rows[largest] = False
    size = float(norms.max())
    return rows, f"every row of its compactor is below {threshold:g}; row {largest}, the largest, stays (norm {size:.2g})"


FAMILY = Family(
    name="resrep",
    title="kxk-BN-1x1, rows of the 1x1 pruned",
    source="arXiv:2007.03260, section 3; DingXiaoH/ResRep",
    kinds=(
        BlockKind(
            "compactor.pwc.weight",
            "conv",
            describe,
            largest="conv.weight",
            ordinary_name=True,
            unread=("compactor.mask",),
            gives_up=gives_up,
        ),
        pair("conv", "bn", deploys_as="conv"),
    ),
    skeletons=(BOTTLENECK_7X7, CIFAR_RESNET, MOBILENET_7X7, VGG, LENET, RESNET_7X7),
    architectures={
        **resnet_variants(50, 101, 152, prefix="sres", skeleton=BOTTLENECK_7X7),
        "src56": cifar_resnet(9),
        "src110": cifar_resnet(18),
        "vc": VGG_16,
        "smi1": mobilenet_v1(MOBILENET_7X7),
    },
    facts=(THRESHOLD,),
    containers="hdf5 (init, epoch-N, finish), {model, optimizer, ...}, bare",
)

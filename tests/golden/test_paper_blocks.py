"""The algebra on the official ACNet and DBB blocks: their formulas, their tensors, their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repdeploy.algebra import AveragePool, Conv, Linear, Norm, Pad
from tests.golden.cases import Case, cases

Tensors = dict[str, Tensor]


def norm(tensors: Tensors, name: str) -> Norm:
    mean, var = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    return Norm(mean, var, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def acnet(tensors: Tensors, arguments: dict[str, int]) -> Linear:
    kernel, padding = arguments["kernel_size"], arguments.get("padding", 0)
    stride, groups, crop = arguments.get("stride", 1), arguments.get("groups", 1), padding - kernel // 2

    def branch(name: str, down: int, across: int) -> Linear:
        weight = tensors[f"{name}_conv.weight"]
        return Conv(weight, None, (stride, stride), (down, across, down, across), (1, 1), groups) >> norm(tensors, f"{name}_bn")

    block: Linear = branch("square", padding, padding) + branch("ver", padding, crop) + branch("hor", crop, padding)
    return block >> norm(tensors, "last_bn") if "last_bn.weight" in tensors else block


def dbb(tensors: Tensors, arguments: dict[str, int]) -> Linear:
    kernel, stride, groups = arguments["kernel_size"], arguments.get("stride", 1), arguments.get("groups", 1)
    border = kernel // 2

    def conv(name: str, step: int, padding: int = 0) -> Conv:
        weight = tensors[f"{name}.weight"]
        if name.endswith("idconv1"):  # the stored weight is what training added to the identity
            rows = torch.arange(weight.shape[0])
            weight = weight.index_put((rows, rows % weight.shape[1]), weight[rows, rows % weight.shape[1]] + 1)
        return Conv(weight, None, (step, step), (padding,) * 4, (1, 1), groups)

    def norm_and_pad(before: Conv, name: str) -> Linear:
        inner = f"{name}.bn" if f"{name}.bn.weight" in tensors else name  # the layout before April 2021 has no inner level
        first = before >> norm(tensors, inner)
        outside = first.squeeze().bias
        assert outside is not None
        return first >> Pad(outside, (border,) * 4)

    first = "idconv1" if "dbb_1x1_kxk.idconv1.weight" in tensors else "conv1"
    block = conv("dbb_origin.conv", stride, border) >> norm(tensors, "dbb_origin.bn")
    chain = norm_and_pad(conv(f"dbb_1x1_kxk.{first}", 1), "dbb_1x1_kxk.bn1") >> conv("dbb_1x1_kxk.conv2", stride)
    block = block + (chain >> norm(tensors, "dbb_1x1_kxk.bn2"))
    like = tensors["dbb_avg.avgbn.weight"]
    if "dbb_1x1.conv.weight" not in tensors:  # depthwise
        pool = AveragePool(like, (kernel, kernel), (stride, stride), (border, border))
        return block + (pool >> norm(tensors, "dbb_avg.avgbn"))
    pooled = norm_and_pad(conv("dbb_avg.conv", 1), "dbb_avg.bn") >> AveragePool(like, (kernel, kernel), (stride, stride))
    point = conv("dbb_1x1.conv", stride) >> norm(tensors, "dbb_1x1.bn")
    return block + point + (pooled >> norm(tensors, "dbb_avg.avgbn"))


def holds(case: Case, block: Linear) -> None:
    x, wanted = case.array("input").double(), case.array("output")
    activation = torch.relu if "nonlinear" in case.meta["constructor"] else torch.nn.Identity()
    largest = float(wanted.abs().max())
    fused = block.squeeze().zero_filled()
    assert float((activation(block.run(x)) - wanted).abs().max()) <= 1e-12 * largest
    assert float((activation(fused.run(x)) - wanted).abs().max()) <= 1e-12 * largest
    rounded = fused.map(lambda tensor: tensor.float())
    assert float((activation(rounded.run(x.float())) - wanted).abs().max()) <= case.bound


@pytest.mark.parametrize("case", cases("acnet/block_*"))
def test_acnet(case: Case) -> None:
    holds(case, acnet(case.tensors(), case.meta["constructor"]))


@pytest.mark.parametrize("case", cases("dbb/block_*"))
def test_dbb(case: Case) -> None:
    holds(case, dbb(case.tensors(), case.meta["constructor"]))

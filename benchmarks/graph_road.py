"""Original against squeezed graph in onnxruntime and OpenVINO, and how long a graph of 1000 operators takes to squeeze.

usage: python -m benchmarks.graph_road [--seconds S] [--image N]
Training-time networks, exported with every layer as trained (`write_plain`), through `repdeploy.convert`: MobileOne-S0, a
detector of RepVGG blocks with a top-down neck, a DBB ResNet-18. One process, both graphs interleaved; synthetic weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repdeploy
from benchmarks.deployed_graph import onnxruntime_graph, openvino_graph
from repdeploy.exporters.onnx_file import write_plain
from repdeploy.graph.squeezer import squeeze
from repdeploy.statistics import interleaved, speedup, warm_up
from sample_models import dbb
from sample_models.backbones import ResNet, settled
from sample_models.mobileone import MobileOne
from sample_models.repvgg import RepVGGBlock


class Detector(nn.Module):
    """RepVGG blocks down to a 32nd of the image, a top-down neck of them, one biased 1x1 head per scale."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 512), outputs: int = 85) -> None:
        super().__init__()
        inputs, stages = 3, []
        for width in widths:
            stages.append(nn.Sequential(RepVGGBlock(inputs, width, 2), RepVGGBlock(width, width, 1)))
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(width, widths[2], 1) for width in widths[2:])
        self.neck = nn.ModuleList(RepVGGBlock(widths[2], widths[2], 1) for _ in widths[2:])
        self.heads = nn.ModuleList(nn.Conv2d(widths[2], outputs, 1) for _ in widths[2:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (batch, 3, height, width), both divisible by 32 -> three maps, fine to coarse."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        found: list[Tensor] = []
        above: Tensor | None = None
        for index in (2, 1, 0):
            level = self.lateral[index](maps[index + 2])
            if above is not None:
                level = level + F.interpolate(above, scale_factor=2.0)
            above = self.neck[index](level)
            found.insert(0, self.heads[index](above))
        return found


def mobileone_s0() -> nn.Module:
    """The paper's S0 (four copies of each convolution)."""
    return MobileOne(blocks=(2, 8, 10, 1), widths=(48, 48, 128, 256, 1024), classes=1000, copies=4)


def dbb_resnet18() -> nn.Module:
    return ResNet(dbb.TRAINING, (2, 2, 2, 2), (64, 64, 128, 256, 512), classes=1000)


def chain(blocks: int) -> nn.Module:
    """RepVGG blocks in a row: eight operators each."""
    return nn.Sequential(*(RepVGGBlock(16, 16, 1) for _ in range(blocks)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileOne-S0": mobileone_s0,
    "RepVGG detector": Detector,
    "DBB ResNet-18": dbb_resnet18,
}
OPERATORS = 1000


def measured(network: nn.Module, name: str, folder: Path, side: int, seconds: float) -> None:
    plain = folder / f"{name.replace(' ', '_')}.onnx"
    write_plain(network, plain, (1, 3, side, side))
    started = time.perf_counter()
    done = repdeploy.convert(plain, output=folder / f"{plain.stem}.repdeploy", input_shape=(1, 3, side, side))
    graph = done.manifest.graph
    assert done.bundle is not None
    assert graph is not None
    worst = max(check.error / check.budget for check in done.manifest.verdict.checks if check.gate == "rounding")
    kinds = [dict(counts).get("Conv", 0) for counts in (graph.operators_before, graph.operators_after)]
    print(
        f"{name}, {side}x{side}: Conv {kinds[0]} -> {kinds[1]}, {done.manifest.architecture}, "
        f"{graph.flops_before / 1e9:.2f} -> {graph.flops_after / 1e9:.2f} GFLOP, "
        f"rounding at most {worst:.2f} of its budget, convert took {time.perf_counter() - started:.0f} s"
    )
    x = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    for runtime, load in (("onnxruntime", onnxruntime_graph), ("OpenVINO", openvino_graph)):
        timers = [load(done.bundle / file, x)[1] for file in ("source.onnx", "model.fp32.onnx")]
        warm_up(timers)
        before, after = interleaved(timers, seconds, least=20, most=2000)
        interval = speedup(before, after)
        print(
            f"  {runtime}: {np.median(before) * 1e3:.1f} -> {np.median(after) * 1e3:.1f} ms, {interval.ratio:.2f}x, "
            f"95 % interval {interval.low:.2f} .. {interval.high:.2f}, {len(before)} runs each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--image", type=int, default=224)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, build in NETWORKS.items():
            torch.manual_seed(0)
            network = settled(build(), 3, options.image).eval()
            measured(network, name, folder, options.image, options.seconds)
        blocks = 1
        while True:  # as many blocks as a thousand operators are
            write_plain(chain(blocks).eval(), folder / "chain.onnx", (1, 16, 32, 32))
            model = ir.load(folder / "chain.onnx")
            count = sum(node.op_type != "Constant" for node in model.graph)
            if count >= OPERATORS:
                break
            blocks = -(-OPERATORS * blocks // count)
        started = time.perf_counter()
        regions = squeeze(model).regions
        print(f"{count} operators, {len(regions)} regions: squeezed and proved in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()

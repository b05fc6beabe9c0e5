"""Record how long the same run takes, again and again: the noise that the tests of the statistics compare with itself.

usage: python -m benchmarks.recorded_noise OUTPUT.npz [--runs N]
One onnxruntime session of a 3x3 stack, on one thread and on all; seconds of every run, in order, as float32.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from repdeploy.exporters.onnx_file import write_plain
from repdeploy.runtimes.onnx_runtime import OnnxSession


def stack(channels: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers))).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=int, default=6000)
    options = parser.parse_args()
    recorded = {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        for name, channels, layers, side in (("small", 16, 4, 28), ("large", 64, 6, 40)):
            file = Path(scratch) / f"{name}.onnx"
            write_plain(stack(channels, layers), file, (1, channels, side, side))
            x = np.random.default_rng(0).standard_normal((1, channels, side, side)).astype(np.float32)
            for threads in dict.fromkeys((1, os.cpu_count() or 1)):
                once = OnnxSession(file, threads).timer(x)
                for _ in range(50):
                    once()
                recorded[f"{name}_{threads}"] = np.array([once() for _ in range(options.runs)], np.float32)
    np.savez_compressed(options.output, **recorded)
    for name, runs in recorded.items():
        low, middle, high = np.quantile(runs, (0.25, 0.5, 0.75))
        print(f"{name}: {len(runs)} runs, median {middle * 1e3:.3g} ms, middle half over {(high - low) / middle:.0%} of it")


if __name__ == "__main__":
    main()

"""Depthwise convolutions in torch by kernel size, NCHW against channels_last: where a layout is wrong, and by how much.

usage: python -m benchmarks.depthwise_layouts [--channels C] [--side N]
One image, stride 1, same padding, all cores; both layouts in turn, each in a session of its own.
"""

from __future__ import annotations

import argparse
import os

from repdeploy.density import depthwise_seconds
from repdeploy.runtimes.torch_eager import CPU, CPU_CHANNELS_LAST

KERNELS = (3, 7, 13, 31)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=28)
    options = parser.parse_args()
    print(f"{options.channels} channels, {options.side}x{options.side}, {os.cpu_count()} threads")
    for kernel in KERNELS:
        there, here = (
            depthwise_seconds(
                runtime, os.cpu_count() or 1, kernel=kernel, channels=options.channels, side=options.side, batch=1, seconds=2.0
            )
            for runtime in (CPU, CPU_CHANNELS_LAST)
        )
        print(f"  {kernel}x{kernel}: NCHW {there * 1e3:.3g} ms, channels_last {here * 1e3:.3g} ms, {there / here:.2f}x")


if __name__ == "__main__":
    main()

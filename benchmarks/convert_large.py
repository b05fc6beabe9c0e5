"""`convert --gates blocks` of RepVGG-D2se (534 MB) against the floor: import torch, map the file, save the 3x3 kernels.

usage: python -m benchmarks.convert_large [--rounds N] [--folder DIR]
Design section 9, row 2: wall at most 2.5x the floor, peak memory at most 1.6x the file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.children import interleaved

FLOOR = """
import torch
state = torch.load("d2se.pth", mmap=True, weights_only=True)
torch.save({k: v for k, v in state.items() if k.endswith("rbr_dense.conv.weight")}, "floor.pth")
"""
MAKE = """
import sys, torch
from sample_models.repvgg import RepVGG
from sample_models.scatter import scatter
model = RepVGG(blocks=(8, 14, 24, 1), widths=(64, 160, 320, 640, 2560), classes=1000, squeeze_excite=True)
torch.save(scatter(model).state_dict(), sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "d2se.pth").exists():
            subprocess.run([sys.executable, "-c", MAKE, str((folder / "d2se.pth").resolve())], check=True)
        size = (folder / "d2se.pth").stat().st_size
        convert = [sys.executable, "-m", "repdeploy", "convert", "d2se.pth", "--family", "repvgg", "--gates", "blocks"]
        commands = {"floor": [sys.executable, "-c", FLOOR], "convert": convert}
        costs = interleaved(commands, folder, options.rounds, clean=("*.repdeploy", "floor.pth"))
    floor, converted = costs["floor"], costs["convert"]
    print(f"file                {size / 1e6:.0f} MB, {options.rounds} rounds, medians")
    wall = converted.seconds / floor.seconds
    print(f"wall over floor     {wall:.2f}x  (bar 2.5x)   {converted.seconds:.2f} s / {floor.seconds:.2f} s")
    print(f"peak over file      {converted.peak_bytes / size:.2f}x  (bar 1.6x)   floor {floor.peak_bytes / size:.2f}x")


if __name__ == "__main__":
    main()

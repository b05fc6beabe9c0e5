"""`repdeploy --help` against the least a Typer and rich command line can cost.

usage: python -m benchmarks.start_up [--rounds N]
Design section 9, row 1: at most 2x `python -c "import typer, rich.console"`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.children import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    commands = {
        "floor": [sys.executable, "-c", "import typer, rich.console"],
        "help": [sys.executable, "-m", "repdeploy", "--help"],
    }
    with tempfile.TemporaryDirectory() as folder:
        costs = interleaved(commands, Path(folder), rounds)
    ratio = costs["help"].seconds / costs["floor"].seconds
    print(f"repdeploy --help over its floor   {ratio:.2f}x  (bar 2x), medians of {rounds} rounds")


if __name__ == "__main__":
    main()

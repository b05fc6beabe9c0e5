"""Stand-ins for libraries that need an NVIDIA GPU: the same names, arities and enums, and no proof of any number."""

from __future__ import annotations

from tests.standins.tensorrt import Build, StandIn, install

__all__ = ["Build", "StandIn", "install"]

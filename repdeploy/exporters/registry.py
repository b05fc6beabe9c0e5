"""The installed exporters: entry-point group `repdeploy.exporters`."""

from __future__ import annotations

from repdeploy.errors import UsageError
from repdeploy.exporters.interface import Exporter
from repdeploy.plugins import Group

EXPORTERS: Group[Exporter] = Group(
    "repdeploy.exporters", "exporter", "repdeploy.exporters.interface.Exporter", lambda item: isinstance(item, Exporter)
)


def require(name: str) -> Exporter:
    """Raises UsageError when no working plugin has that name."""
    return EXPORTERS.require(name, UsageError, "repdeploy doctor lists what is installed")

"""Entry points: how families, exporters and runtimes are found, ours and others' in the same way."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from repdeploy.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Installed(Generic[T]):
    """One entry point: what it loads to, or the error its import ended with."""

    name: str
    distribution: str
    value: T | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group(Generic[T]):
    """An entry-point group. `noun`: what its members are called in messages; `wanted`: what they have to be; `fits`: whether
    something is that."""

    group: str
    noun: str
    wanted: str
    fits: Callable[[object], bool]

    def installed(self) -> tuple[Installed[T], ...]:
        """Every plugin, in the order of their names; one that fails to import is listed with its error.

        Raises UsageError when two distributions offer the same name.
        """
        found: dict[str, Installed[T]] = {}
        for entry in sorted(entry_points(group=self.group), key=lambda item: item.name):
            item = self._load(entry)
            if item.name in found:
                raise UsageError(
                    f"two distributions provide the {self.noun} {item.name!r}: {found[item.name].distribution} and "
                    f"{item.distribution}",
                    hint="uninstall one of them",
                )
            found[item.name] = item
        return tuple(found.values())

    def working(self) -> tuple[T, ...]:
        """Those that can be used."""
        return tuple(item.value for item in self.installed() if item.value is not None)

    def require(self, name: str, error: type[UsageError], otherwise: str) -> T:
        """Raises `error` when no working plugin has that name; `otherwise`: the hint where none is called nearly so."""
        known = {item.name: item for item in self.installed()}
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise error(
                f"no {self.noun} is called {name!r}; installed: {', '.join(known)}",
                hint=f"did you mean {nearest[0]!r}?" if nearest else otherwise,
            )
        found = known[name]
        if found.value is None:
            raise error(
                f"the plugin for {name!r} ({found.distribution}) does not load: {found.error}",
                hint="update or reinstall that distribution",
            )
        return found.value

    def _load(self, entry: EntryPoint) -> Installed[T]:
        distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
        try:
            loaded = entry.load()
        except Exception as reason:  # a plugin is somebody else's code: whatever it raises, the others must still work
            return Installed(entry.name, distribution, None, f"{type(reason).__name__}: {reason}")
        if not self.fits(loaded):
            return Installed(entry.name, distribution, None, f"{entry.value} is no {self.wanted}")
        return Installed(entry.name, distribution, loaded)

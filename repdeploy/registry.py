"""Find families through the entry-point group `repdeploy.families`: ours get no privileges."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from repdeploy.errors import UnknownFamily, UsageError
from repdeploy.family import Family
from repdeploy.records import FamilyInfo

GROUP = "repdeploy.families"


@dataclass(frozen=True, slots=True)
class Installed:
    """One entry point: the family, or the error its import ended with."""

    name: str
    distribution: str
    family: Family | None
    error: str = ""


def installed() -> tuple[Installed, ...]:
    """Every family plugin, in the order of their names; one that fails to import is listed with its error.

    Raises UsageError when two distributions offer the same name.
    """
    found: dict[str, Installed] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda item: item.name):
        item = _load(entry)
        if item.name in found:
            raise UsageError(
                f"two distributions provide the family {item.name!r}: {found[item.name].distribution} and {item.distribution}",
                hint="uninstall one of them",
            )
        found[item.name] = item
    return tuple(found.values())


def families() -> tuple[Family, ...]:
    """The families that can be used."""
    return tuple(item.family for item in installed() if item.family is not None)


def require(name: str) -> None:
    """Raises UnknownFamily when no working plugin has that name."""
    known = {item.name: item for item in installed()}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        raise UnknownFamily(
            f"no family is called {name!r}; installed: {', '.join(known)}",
            hint=f"did you mean {nearest[0]!r}?" if nearest else "leave --family out to have it recognised",
        )
    if known[name].family is None:
        raise UnknownFamily(
            f"the plugin for {name!r} ({known[name].distribution}) does not load: {known[name].error}",
            hint="update or reinstall that distribution",
        )


def describe() -> tuple[FamilyInfo, ...]:
    """What `repdeploy families` lists."""
    return tuple(
        FamilyInfo(item.name, "", "", item.distribution, (), (), error=item.error)
        if item.family is None
        else FamilyInfo(
            item.name,
            item.family.title,
            item.family.source,
            item.distribution,
            tuple(item.family.architectures),
            tuple(skeleton.name for skeleton in item.family.skeletons),
            tuple(dict.fromkeys(kind.name for kind in item.family.all_facts)),
            item.family.containers,
        )
        for item in installed()
    )


def _load(entry: EntryPoint) -> Installed:
    distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
    try:
        family = entry.load()
    except Exception as reason:  # a plugin is somebody else's code: whatever it raises, the others must still work
        return Installed(entry.name, distribution, None, f"{type(reason).__name__}: {reason}")
    if not isinstance(family, Family):
        return Installed(entry.name, distribution, None, f"{entry.value} is no repdeploy.family.Family")
    return Installed(entry.name, distribution, family)

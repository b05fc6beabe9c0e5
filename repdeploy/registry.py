"""The installed families: entry-point group `repdeploy.families`."""

from __future__ import annotations

from repdeploy.errors import UnknownFamily
from repdeploy.family import Family
from repdeploy.plugins import Group
from repdeploy.records import FamilyInfo

FAMILIES: Group[Family] = Group(
    "repdeploy.families", "family", "repdeploy.family.Family", lambda item: isinstance(item, Family)
)


def families() -> tuple[Family, ...]:
    """The families that can be used."""
    return FAMILIES.working()


def require(name: str) -> None:
    """Raises UnknownFamily when no working plugin has that name."""
    FAMILIES.require(name, UnknownFamily, "leave --family out to have it recognised")


def describe() -> tuple[FamilyInfo, ...]:
    """What `repdeploy families` lists."""
    return tuple(
        FamilyInfo(item.name, "", "", item.distribution, (), (), error=item.error)
        if item.value is None
        else FamilyInfo(
            item.name,
            item.value.title,
            item.value.source,
            item.distribution,
            tuple(item.value.architectures),
            tuple(skeleton.name for skeleton in item.value.skeletons),
            tuple(dict.fromkeys(kind.name for kind in item.value.all_facts)),
            item.value.containers,
        )
        for item in FAMILIES.installed()
    )

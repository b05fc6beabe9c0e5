"""Facts that no checkpoint stores (stride, padding, dilation, groups, batch norm's eps), each with its origin.

They come, in this order, from `--set`, from `--arch`, from what the file says beside its tensors, and from the
convention of the network. A fact is recorded when something reads it, so the list holds only what mattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from repdeploy.errors import InputError, UnknownFact, UsageError
from repdeploy.records import Fact, Origin

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FactKind:
    """A fact by name: how its text is read, and what it means (printed when a name is not known)."""

    name: str
    parse: Callable[[str], Any]
    meaning: str


def positive_int(text: str) -> int:
    """Raises ValueError."""
    if (value := int(text)) < 1:
        raise ValueError("a whole number of at least 1")
    return value


def whole_number(text: str) -> int:
    """Raises ValueError."""
    if (value := int(text)) < 0:
        raise ValueError("a whole number of at least 0")
    return value


def positive_float(text: str) -> float:
    """Raises ValueError."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError("a positive number")
    return value


def number_from_zero(text: str) -> float:
    """Raises ValueError."""
    if not 0 <= (value := float(text)) < float("inf"):
        raise ValueError("a number of at least 0")
    return value


def yes_or_no(text: str) -> bool:
    """Raises ValueError."""
    answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in answers:
        raise ValueError("true or false")
    return answers[text.lower()]


def one_of(*names: str) -> Callable[[str], str]:
    """A parser for one of these names, which raises ValueError for any other."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return parse


GEOMETRY = (
    FactKind("eps", positive_float, "what batch norm adds to the variance, for example 1e-3"),
    FactKind("stride", positive_int, "stride of a block, for example stage3.0.stride=1"),
    FactKind("dilation", positive_int, "dilation of a block's largest kernel, for example stage3.dilation=2"),
    FactKind("padding", whole_number, "padding of a block's largest kernel"),
    FactKind("groups", positive_int, "groups of a block"),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One fact that was stated: by `--set`, by `--arch`, or by a bundle about itself."""

    scope: str
    name: str
    value: Any
    origin: Origin = "set"

    def covers(self, scope: str) -> bool:
        return self.scope in ("", scope) or scope.startswith(f"{self.scope}.")


def parse_settings(texts: Iterable[str], kinds: Iterable[FactKind]) -> tuple[Setting, ...]:
    """Read `[SCOPE.]NAME=VALUE`. Raises UnknownFact for a name nobody reads, UsageError for a value that is none."""
    table = {kind.name: kind for kind in kinds}
    settings = []
    for text in texts:
        place, equals, value = text.partition("=")
        scope, _, name = place.strip().rpartition(".")
        if not equals or not name:
            raise UsageError(f"--set {text}: expected [SCOPE.]NAME=VALUE", hint="for example --set eps=1e-3")
        if name not in table:
            known = "; ".join(f"{kind.name}: {kind.meaning}" for kind in table.values())
            raise UnknownFact(f"--set {text}: no fact is called {name!r}", hint=f"known facts: {known}")
        try:
            settings.append(Setting(scope, name, table[name].parse(value.strip())))
        except ValueError as reason:
            raise UsageError(
                f"--set {text}: {value!r} is no value of {name}", hint=f"{name}: {table[name].meaning}"
            ) from reason
    return tuple(settings)


class Facts:
    """Resolves facts and remembers which were used. `attributes`: per module of a pickled network, its geometry."""

    def __init__(self, settings: Iterable[Setting] = (), attributes: Mapping[str, Mapping[str, object]] | None = None) -> None:
        self.settings = tuple(settings)
        self.attributes = attributes or {}
        self._used: dict[tuple[str, str, Origin], dict[str, None]] = {}
        self._touched: set[Setting] = set()

    def stated(self, scope: str, name: str) -> Setting | None:
        """The innermost setting of that name that covers the scope."""
        covering = [item for item in self.settings if item.name == name and item.covers(scope)]
        return max(covering, key=lambda item: len(item.scope), default=None)

    def tells(self, scope: str, name: str, module: str) -> bool:
        """Whether somebody states a fact, or the file does."""
        return self.stated(scope, name) is not None or name in self.attributes.get(module, {})

    def resolve(
        self,
        scope: str,
        name: str,
        *,
        module: str | None = None,
        convention: T,
        origin: Origin = "skeleton",
        read: Callable[[object], T] | None = None,
        is_plain: bool = False,
    ) -> T:
        """The value of a fact for a block. `module`: the submodule whose stored attribute `read` may take it from.

        `is_plain`: for a layer that is no block, such as squeeze-excite. What is said about the block around it is not said
        about such a layer, and its convention is not worth a line in the report.
        """
        setting = self.stated(scope, name)
        if is_plain and setting is not None and setting.scope != scope:
            setting = None
        if setting is not None:
            self._touched.add(setting)
            value: T = setting.value
            return self.used(scope, name, value, setting.origin)
        if module is not None and read is not None and name in self.attributes.get(module, {}):
            try:
                return self.used(scope, name, read(self.attributes[module][name]), "file")
            except (TypeError, ValueError) as reason:
                raise InputError(
                    f"{module} was pickled with {name} = {self.attributes[module][name]!r}, which is not understood",
                    hint=f"state it with --set {scope}.{name}=VALUE",
                ) from reason
        return convention if is_plain else self.used(scope, name, convention, origin)

    def used(self, scope: str, name: str, value: T, origin: Origin) -> T:
        self._used.setdefault((name, str(value), origin), {})[scope] = None
        return value

    def without_hints(self, name: str, fits: Callable[[Any], bool]) -> Facts:
        """The same, without what the file says of a fact where that does not fit: shapes beat what a file calls itself."""
        kept = (item for item in self.settings if item.name != name or item.origin != "file" or fits(item.value))
        found = Facts(kept, self.attributes)
        found.absorb(self)
        return found

    def unrecorded(self) -> Facts:
        """The same answers, for an attempt that may come to nothing."""
        return Facts(self.settings, self.attributes)

    def absorb(self, attempt: Facts) -> None:
        """Take over what a successful attempt used."""
        for (name, value, origin), scopes in attempt._used.items():
            for scope in scopes:
                self.used(scope, name, value, origin)
        self._touched |= attempt._touched

    def record(self) -> tuple[Fact, ...]:
        return tuple(Fact(name, value, origin, tuple(scopes)) for (name, value, origin), scopes in self._used.items())

    def unused(self) -> tuple[Setting, ...]:
        return tuple(item for item in self.settings if item.origin == "set" and item not in self._touched)


def settings_of(facts: Iterable[Fact], kinds: Iterable[FactKind]) -> tuple[Setting, ...]:
    """The recorded facts of a bundle, as settings that rebuild the same network."""
    table = {kind.name: kind for kind in kinds}
    return tuple(
        Setting(scope, fact.name, table[fact.name].parse(fact.value), fact.origin)
        for fact in facts
        if fact.name in table
        for scope in fact.scopes
    )

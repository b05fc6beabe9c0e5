"""Classes generated from a listing of Python bindings: what the listing lacks does not exist, what it has is checked.

A listing is what the public Python bindings of TensorRT 10.14 and 11.4 say of themselves: every class with its members, and
each member as a pybind signature, "property", "enum=N" or "callable" (overloads, which pybind does not list in one line).
What a class does is written elsewhere, as a `Behaviour`; a member of the listing that its behaviour lacks raises
NotImplementedError with its name.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

HERE = Path(__file__).resolve().parent
NOT_SIMULATED = "not simulated"
"""In the place of a type in `Behaviour.written`: the bindings let one assign it, and the stand-in does not."""
FORWARDED = ("__len__", "__getitem__", "__setitem__", "__eq__", "__bool__", "__str__", "__repr__")
"""Special methods are in no listing; a behaviour that writes one has read it in the bindings' source."""
BYTES_ONLY = ("__len__", "__getitem__", "__iter__", "__contains__", "__add__", "__mul__", "__rmul__", "__mod__")
"""What bytes can and IHostMemory cannot."""
OVERLOADS: Mapping[str, tuple[str, ...]] = {
    "Builder.build_serialized_network": (
        "(self: Builder, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory",
    ),
    "Dims.__init__": ("(self: Dims) -> None", "(self: Dims, shape: List[int]) -> None"),
    "ICudaEngine.create_execution_context": (
        "(self: ICudaEngine, strategy: ExecutionContextAllocationStrategy = "
        "<ExecutionContextAllocationStrategy.STATIC: 0>) -> IExecutionContext",
        "(self: ICudaEngine, runtime_config: IRuntimeConfig) -> IExecutionContext",
    ),
    **{
        f"ICudaEngine.{name}": (
            "(self: ICudaEngine, name: str) -> T",
            "(self: ICudaEngine, name: str, profile_index: int) -> T",
        )
        for name in (
            "get_tensor_bytes_per_component", "get_tensor_components_per_element", "get_tensor_format",
            "get_tensor_format_desc", "get_tensor_vectorized_dim",
        )
    },
    "IExecutionContext.set_input_shape": ("(self: IExecutionContext, name: str, shape: Dims) -> bool",),
    "Refitter.set_named_weights": (
        "(self: Refitter, name: str, weights: Weights) -> bool",
        "(self: Refitter, name: str, weights: Weights, location: TensorLocation) -> bool",
    ),
    "Runtime.deserialize_cuda_engine": ("(self: Runtime, serialized_engine: buffer) -> ICudaEngine",),
    "Weights.__init__": (
        "(self: Weights, type: DataType = <DataType.FLOAT: 0>) -> None",
        "(self: Weights, type: DataType, ptr: int, count: int) -> None",
        "(self: Weights, a: numpy.ndarray) -> None",
    ),
}  # fmt: skip
"""What is listed as "callable" only, after the bindings' published source."""
SEVERITY = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
"""ILogger.Severity is nested, so that the listing does not number it; these are NVIDIA's documented numbers."""


@dataclass(frozen=True)
class Listing:
    """What one version of the bindings has."""

    version: str
    classes: Mapping[str, Mapping[str, str]]
    functions: Mapping[str, str]


def listing(version: str) -> Listing:
    path = HERE / f"tensorrt-{version}.json"
    if not path.is_file():
        known = sorted(path.stem.removeprefix("tensorrt-") for path in HERE.glob("tensorrt-*.json"))
        raise ValueError(f"no listing of TensorRT {version}; there are {', '.join(known)}")
    return Listing(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Parameter:
    """One argument as its signature writes it."""

    name: str
    kind: str
    default: str | None


def parse_signature(text: str) -> tuple[Parameter, ...]:
    """The parameters after `self` of a pybind signature, "f(self: X, a: int = 0) -> T"."""
    inside = text[text.index("(") + 1 : text.rindex(") ->")]
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[<(") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = []
    for part in filter(None, map(str.strip, parts)):
        name, _, rest = part.partition(": ")
        kind, _, default = rest.partition(" = ")
        found.append(Parameter(name, kind, default or None))
    return tuple(found[1:] if found and found[0].name == "self" else found)


class Guarded(type):
    """The type of every generated class: closed against new attributes, and sure that `__init__` of the base was called."""

    def __setattr__(cls, name: str, value: object) -> None:
        if "_listed" in vars(cls) and name not in ("__abstractmethods__", "__doc__"):
            raise AttributeError(f"type object {cls.__name__!r}: {name!r} cannot be set")
        super().__setattr__(name, value)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if isinstance(made, Strict) and not hasattr(made, "_state"):
            base = next(parent for parent in cls.__mro__ if "_listed" in vars(parent))
            raise TypeError(f"tensorrt.tensorrt.{base.__name__}.__init__() must be called when overriding __init__")
        return made


class Strict(metaclass=Guarded):
    """The base of every generated class that is neither an enum nor a buffer. No dictionary: an unknown name cannot be set."""

    __slots__ = ("__weakref__", "_state")
    _state: Behaviour


class Member:
    """The base of every generated enum: like a pybind enum it is no int, and only int(member) gives its number."""

    __slots__ = ("_number",)
    __members__: ClassVar[dict[str, Member]]
    _number: int

    @property
    def name(self) -> str:
        return next(name for name, member in type(self).__members__.items() if member._number == self._number)

    @property
    def value(self) -> int:
        return self._number

    def __int__(self) -> int:
        return self._number

    def __index__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and type(self) is type(other) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._number}>"


class Ordered(Member):
    """An enum that its users compare, severity <= WARNING, with its own kind only."""

    __slots__ = ()

    def _number_of(self, other: object) -> int:
        if not isinstance(other, Member) or type(self) is not type(other):
            raise TypeError("Expected an enumeration of matching type!")
        return other._number

    def __lt__(self, other: object) -> bool:
        return self._number < self._number_of(other)

    def __le__(self, other: object) -> bool:
        return self._number <= self._number_of(other)

    def __gt__(self, other: object) -> bool:
        return self._number > self._number_of(other)

    def __ge__(self, other: object) -> bool:
        return self._number >= self._number_of(other)


class GuardedEnum(Guarded):
    """BuilderFlag(3) is the member of that number."""

    def __call__(cls, value: int) -> Any:
        members: dict[str, Member] = vars(cls)["__members__"]
        for member in members.values():
            if member._number == operator.index(value):
                return member
        raise ValueError(f"{cls.__name__} has no member of value {value}")


class Behaviour:
    """What a class of the listing does. Public names are the listing's; `written` says which properties may be assigned."""

    of: ClassVar[str]
    """The class of the listing."""
    written: ClassVar[Mapping[str, str]] = {}
    """Property -> type, in the notation of the signatures; a question mark at the end admits None."""

    def __init__(self, world: Any) -> None:
        self._world = world

    _facade: Any = None

    @classmethod
    def simulates(cls, member: str) -> bool:
        return any(member in vars(parent) or member in vars(parent).get("__annotations__", {}) for parent in cls.__mro__)


class Callback(Behaviour):
    """An interface that its user subclasses; NVIDIA's code calls the subclass, never this."""


@dataclass
class Bindings:
    """Every class of one listing, generated, and the way between a behaviour and what its user holds."""

    listing: Listing
    behaviours: Mapping[str, type[Behaviour]]
    world: Any
    classes: dict[str, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes["Severity"] = self._enum("Severity", {n: f"enum={v}" for n, v in SEVERITY.items()}, Ordered)
        parents = {"Logger": "ILogger", "Profiler": "IProfiler"}
        for name in sorted(self.listing.classes, key=lambda name: name in parents):
            members = self.listing.classes[name]
            if any(text.startswith("enum=") for text in members.values()):
                self.classes[name] = self._enum(name, members, Member)
            elif name == "IHostMemory":
                self.classes[name] = self._buffer(name, members)
            else:
                parent = self.classes[parents[name]] if name in parents else Strict
                self.classes[name] = self._class(name, members, parent)

    # ---- between behaviours and what the user holds

    def facade(self, behaviour: Behaviour) -> Any:
        if behaviour._facade is None:
            cls: Any = self.classes[behaviour.of]
            behaviour._facade = cls.__new__(cls)
            behaviour._facade._state = behaviour
        return behaviour._facade

    def outside(self, value: Any) -> Any:
        if isinstance(value, Behaviour):
            return self.facade(value)
        return [self.outside(each) for each in value] if isinstance(value, list) else value

    def member(self, enum: str, name: str) -> Any:
        return vars(self.classes[enum])["__members__"][name]

    def members(self, enum: str) -> dict[str, int]:
        return {name: int(member) for name, member in vars(self.classes[enum])["__members__"].items()}

    def memory(self, data: bytes) -> Any:
        return bytes.__new__(self.classes["IHostMemory"], data)

    # ---- arguments

    def convert(self, kind: str, value: Any) -> Any:
        """`value` as a behaviour sees it; TypeError where the bindings would not take it, or where int(...) is missing."""
        refused = TypeError(f"expected {kind}, got {type(value).__name__} ({value!r:.60})")
        if kind.endswith("?"):
            return None if value is None else self.convert(kind[:-1], value)
        if many := re.fullmatch(r"(?:typing\.|collections\.abc\.)?(?:List|list|Sequence)\[(.*)\]", kind):
            if not isinstance(value, list | tuple):
                raise refused
            return [self.convert(many[1], each) for each in value]
        name = re.split(r"\.|::", kind)[-1]
        if name in ("int", "SupportsInt"):
            if isinstance(value, Member) or not hasattr(value, "__index__"):
                raise refused
            return operator.index(value)
        if name in ("float", "SupportsFloat"):
            if isinstance(value, Member) or not isinstance(value, int | float | np.number):
                raise refused
            return float(value)
        if name == "bool":
            if not isinstance(value, bool | np.bool_):
                raise refused
            return bool(value)
        if name == "str":
            if not isinstance(value, str):
                raise refused
            return value
        if name in ("buffer", "Buffer"):
            try:
                return memoryview(value).tobytes()
            except TypeError:
                raise refused from None
        if name == "ndarray":
            if not isinstance(value, np.ndarray):
                raise refused
            return value
        if name == "capsule" or kind.endswith("CapsuleType"):
            return value
        cls: Any = self.classes.get("ParserError" if name == "IParserError" else name)
        if cls is None:
            raise NotImplementedError(f"the stand-in has no argument type {kind}")
        if name == "Weights" and isinstance(value, np.ndarray):
            return cls(value)._state  # the bindings convert an array by themselves
        if name == "Dims" and isinstance(value, list | tuple):
            return tuple(self.convert("int", each) for each in value)
        if not isinstance(value, cls):
            raise refused
        if name == "Dims":
            return tuple(value)
        return value._state if isinstance(value, Strict) else value

    def default(self, text: str) -> Any:
        if enum := re.fullmatch(r"<(\w+)\.(\w+): \d+>", text):
            return self.member(enum[1], enum[2])
        return {"None": None, "True": True, "False": False}[text] if not text.isdecimal() else int(text)

    def bind(self, where: str, signatures: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments in the signature's order, checked; the first overload that fits, as pybind does."""
        reasons = []
        for signature in signatures:
            parameters = parse_signature(signature)
            try:
                return self._bind_one(parameters, args, kwargs)
            except TypeError as error:
                reasons.append(f"{signature}: {error}")
        raise TypeError(f"{where}(): incompatible function arguments. " + "; ".join(reasons))

    def _bind_one(self, parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        names = [parameter.name for parameter in parameters]
        if len(args) > len(names):
            raise TypeError(f"takes {len(names)} arguments, {len(args)} were given")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in names:
                raise TypeError(f"argument {name!r} is {'given twice' if name in given else 'unknown'}")
            given[name] = value
        values = []
        for parameter in parameters:
            if parameter.name in given:
                kind = parameter.kind + ("?" if parameter.default == "None" else "")
                values.append(self.convert(kind, given[parameter.name]))
            elif parameter.default is None:
                raise TypeError(f"argument {parameter.name!r} is missing")
            else:
                values.append(self.default(parameter.default))
        return values

    # ---- generated classes

    def _enum(self, name: str, members: Mapping[str, str], base: type[Member]) -> type:
        space: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt", "__members__": {}, "_listed": True}
        for member, text in members.items():
            if text == "property":
                space[member] = property(self._enum_property(name, member))
        made: Any = GuardedEnum(name, (base,), space)
        for member, text in members.items():
            if text.startswith("enum="):
                value = object.__new__(made)
                value._number = int(text.removeprefix("enum="))
                type.__setattr__(made, member, value)
                space["__members__"][member] = value
        return cast(type, made)

    def _enum_property(self, enum: str, member: str) -> Callable[[Any], Any]:
        def read(self_: Any) -> Any:
            values = self.world.enum_properties.get(f"{enum}.{member}")
            if values is None:
                raise NotImplementedError(f"{enum}.{member} is not simulated")
            return values[self_.name]

        return read

    def _buffer(self, name: str, members: Mapping[str, str]) -> type:
        """IHostMemory: bytes below, for the buffer protocol of Python 3.11, and nothing of bytes above."""
        readers: dict[str, Callable[[Any], Any]] = {
            "nbytes": lambda self_: bytes.__len__(self_),
            "dtype": lambda _: self.member("DataType", "INT8"),
        }

        def attribute(self_: Any, wanted: str) -> Any:
            if wanted.startswith("__") or wanted in members:
                return object.__getattribute__(self_, wanted)
            raise AttributeError(f"'tensorrt.tensorrt.{name}' object has no attribute {wanted!r}")

        def refuse(*_: Any) -> Any:
            raise TypeError(f"'tensorrt.tensorrt.{name}' supports the buffer protocol only: bytes(memory), memoryview(memory)")

        def construct(*_: Any, **__: Any) -> Any:
            raise TypeError(f"tensorrt.tensorrt.{name}: No constructor defined!")

        space: dict[str, Any] = {
            "__slots__": (), "__module__": "tensorrt.tensorrt", "_listed": True, "__getattribute__": attribute,
            "__new__": construct, "__eq__": object.__eq__, "__hash__": object.__hash__, "__repr__": object.__repr__,
            **dict.fromkeys(BYTES_ONLY, refuse), **{m: property(readers[m]) for m in members if m != "__init__"},
        }  # fmt: skip
        return Guarded(name, (bytes,), space)

    def _class(self, name: str, members: Mapping[str, str], parent: type) -> type:
        space: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt", "_listed": True}
        behaviour = self.behaviours.get(name)
        for member, text in members.items():
            if member == "__init__":
                space[member] = self._constructor(name, text, behaviour)
            elif member in SEVERITY:
                space[member] = self.member("Severity", member)
            elif member == "Severity":
                space[member] = self.classes["Severity"]
            elif (name, member) == ("Dims", "MAX_DIMS"):
                space[member] = 8
            elif text == "property":
                space[member] = self._property(name, member, behaviour)
            else:
                space[member] = self._method(name, member, text, behaviour)
        for special in FORWARDED:
            if behaviour and any(special in vars(each) for each in behaviour.__mro__[:-1]):
                space[special] = self._forward(special)
        if "__eq__" in space:
            space["__hash__"] = None
        return Guarded(name, (parent,), space)

    def _constructor(self, name: str, text: str, behaviour: type[Behaviour] | None) -> Callable[..., None]:
        def construct(self_: Any, *args: Any, **kwargs: Any) -> None:
            if text.startswith("Initialize self"):
                raise TypeError(f"tensorrt.tensorrt.{name}: No constructor defined!")
            if behaviour is None:
                raise NotImplementedError(f"tensorrt.{name} is not simulated")
            signatures = OVERLOADS[f"{name}.__init__"] if text == "callable" else (text,)
            self_._state = behaviour(self.world, *self.bind(f"{name}.__init__", signatures, args, kwargs))
            self_._state._facade = self_

        return construct

    def _method(self, name: str, member: str, text: str, behaviour: type[Behaviour] | None) -> Callable[..., Any]:
        def call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            if behaviour is None or not behaviour.simulates(member):
                raise NotImplementedError(f"tensorrt.{name}.{member} is not simulated")
            signatures = OVERLOADS[f"{name}.{member}"] if text == "callable" else (text,)
            bound = self.bind(f"{name}.{member}", signatures, args, kwargs)
            return self.outside(getattr(self_._state, member)(*bound))

        call.__name__, call.__qualname__, call.__doc__ = member, f"{name}.{member}", text
        return call

    def _property(self, name: str, member: str, behaviour: type[Behaviour] | None) -> property:
        def simulated() -> type[Behaviour]:
            if behaviour is None or not behaviour.simulates(member):
                raise NotImplementedError(f"tensorrt.{name}.{member} is not simulated")
            return behaviour

        def read(self_: Any) -> Any:
            simulated()
            return self.outside(getattr(self_._state, member))

        def write(self_: Any, value: Any) -> None:
            kind = simulated().written.get(member)
            if kind is None:
                raise AttributeError(f"property {member!r} of 'tensorrt.tensorrt.{name}' object has no setter")
            if kind == NOT_SIMULATED:
                raise NotImplementedError(f"tensorrt.{name}.{member} is not simulated for writing")
            setattr(self_._state, member, self.convert(kind, value))

        return property(read, write)

    def _forward(self, special: str) -> Callable[..., Any]:
        def call(self_: Any, *args: Any) -> Any:
            return getattr(self_._state, special)(*args)

        return call


def flags(bits: int, numbers: Mapping[str, int], what: str) -> frozenset[str]:
    """The names whose bits are set; ValueError for a bit that this version does not know."""
    if unknown := [bit for bit in range(bits.bit_length()) if bits >> bit & 1 and bit not in numbers.values()]:
        raise ValueError(f"{what}: no flag has bit {unknown}; there are {dict(numbers)}")
    return frozenset(name for name, bit in numbers.items() if bits >> bit & 1)


def product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result

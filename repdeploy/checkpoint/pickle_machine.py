"""Read a pickle as data: nothing is imported, nothing is called, whatever the file asks for.

A pickle is a program for a small stack machine. This one runs it with inert values: a global is only its name, an
object is only its class's name, arguments and state. The few constructors that tensors and containers need are
reproduced here as plain functions. Work, memory and nesting are bounded. Source: the opcodes of CPython's `pickletools`.
"""

from __future__ import annotations

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # pickle's own tables
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from repdeploy.errors import UnreadableCheckpoint, UnsafeCheckpoint

MAX_OPERATIONS = 20_000_000
"""A checkpoint of 2000 tensors with its optimizer takes about 200 000, one with an index of ImageNet 6 million."""
MAX_COPIED = 5_000_000
"""How many items (or 256 characters) the pickle may have copied by calling constructors."""
MAX_NAME = 500
"""Characters of a class's name."""
MAX_INERT = 1000
"""How many classes are remembered by name for the report."""
MAX_DEPTH = 200
"""How deeply lists, dicts and objects may be nested; a module tree rarely passes 60."""

RUNS_CODE = frozenset(
    "os posix nt subprocess _posixsubprocess sys shutil socket importlib runpy ctypes pty webbrowser bdb doctest pydoc "
    "cProfile profile ensurepip".split()
)
"""Packages whose functions a pickle names only to run them. Nothing is ever executed here: the refusal tells the user."""
RUNS_CODE_MODULES = RUNS_CODE | frozenset("code codeop imp pdb timeit".split())
"""The same for modules whose names a user's own package may have: `code.models.Net` is a class, `code.interact` is not."""
RUNS_CODE_BY_NAME = frozenset(
    "builtins.eval builtins.exec builtins.compile builtins.open builtins.__import__ builtins.input builtins.breakpoint "
    "builtins.globals builtins.locals builtins.setattr builtins.delattr io.open io.FileIO io.open_code codecs.open "
    "pickle.loads pickle.load torch.load torch.hub.load numpy.load functools.reduce operator.methodcaller".split()
)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def runs_code(self) -> bool:
        if self.module in RUNS_CODE_MODULES or self.module.split(".")[0] in RUNS_CODE:
            return True
        return f"{self.module.removeprefix('_')}.{self.name}" in RUNS_CODE_BY_NAME


@dataclass(slots=True, eq=False)
class Instance:
    """An object of a class that is not loaded: constructor arguments, state, and what was appended or set on it."""

    of: Global
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the object holds by name."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # (state, slots)
            state = {**(state[0] or {}), **state[1]} if isinstance(state[0], dict | None) else state[1]
        held = state if isinstance(state, dict) else {}
        return {key: value for key, value in {**held, **self.entries}.items() if isinstance(key, str)}


ASK = "ask the file's author for a plain state_dict or a .safetensors file"
DAMAGED = "the file is truncated or damaged; copy or download it again"
_DAMAGE = (
    LookupError, TypeError, ValueError, AttributeError, struct.error, ArithmeticError, MemoryError, RecursionError, OSError,
)  # fmt: skip
_MARK = object()
Constructor = Callable[..., Any]


class PickleMachine:
    """Runs one pickle. `constructors`: plain functions that stand for named globals; `persistent`: resolves persistent ids.

    Raises UnsafeCheckpoint where the pickle names something whose only use is to run code, or exceeds a bound;
    UnreadableCheckpoint where it is malformed.
    """

    def __init__(self, constructors: dict[str, Constructor], persistent: Callable[[Any], Any]) -> None:
        self.constructors = constructors
        self.persistent = persistent
        self.inert: set[str] = set()
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, stream: Any) -> Any:
        """Read one pickle from a binary file object; the stream stands behind it afterwards."""
        operations = 0
        try:
            for operation, argument, _ in _operations(stream):
                operations += 1
                if operations > MAX_OPERATIONS:
                    raise UnsafeCheckpoint(f"the pickle takes more than {MAX_OPERATIONS:,} steps", hint=ASK)
                if operation == "STOP":
                    return self._stack.pop()
                _STEPS[operation](self, argument)
        except (UnsafeCheckpoint, UnreadableCheckpoint):
            raise
        except _DAMAGE as reason:
            raise UnreadableCheckpoint(f"the pickle is damaged at its step {operations}", hint=DAMAGED) from reason
        raise UnreadableCheckpoint("the pickle has no end", hint=DAMAGED)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def top(self) -> Any:
        return self._stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise ValueError("no mark on the stack")

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def remember_next(self) -> None:
        self.remember(len(self._memo))

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def find(self, module: str, name: str) -> Global:
        if len(module) + len(name) > MAX_NAME:
            raise UnsafeCheckpoint(f"the pickle names a class with {len(module) + len(name):,} characters", hint=ASK)
        found = Global(*_today(module, name))
        if found.runs_code:
            raise UnsafeCheckpoint(
                f"the pickle calls {found} when it is loaded; weights never do. Nothing was executed",
                hint="do not open this file with torch.load; ask its author for a plain state_dict or a .safetensors file",
            )
        return found

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            return Instance(Global("?", type(function).__name__), arguments if isinstance(arguments, tuple) else ())
        constructor = self.constructors.get(str(function))
        if constructor is not None or str(function) == "_codecs.encode":
            self._copied += sum(len(item) for item in arguments if isinstance(item, list | tuple | dict))
            self._copied += sum(len(item) // 256 for item in arguments if isinstance(item, str | bytes))
            if self._copied > MAX_COPIED:
                raise UnsafeCheckpoint("the pickle copies more than a checkpoint can hold", hint=ASK)
        if constructor is not None:
            return constructor(*arguments)
        if str(function) == "_codecs.encode" and len(arguments) == 2:
            return arguments[0].encode("latin1")
        if str(function) == "copyreg._reconstructor" and arguments and isinstance(arguments[0], Global):
            return self.new(arguments[0], ())
        return self.new(function, arguments)

    def new(self, of: Any, arguments: tuple[Any, ...]) -> Instance:
        of = of if isinstance(of, Global) else Global("?", type(of).__name__)
        if of.module != "builtins" and len(self.inert) < MAX_INERT:
            self.inert.add(str(of))
        return Instance(of, arguments)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Instance):
            target.state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        into = target.entries if isinstance(target, Instance) else target
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[hashable(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self.top()
        (target.items if isinstance(target, Instance) else target).extend(items)


def _today(module: str, name: str) -> tuple[str, str]:
    """Protocol 2, which torch.save writes, spells names as Python 2 did: `__builtin__`, `commands`, ..."""
    renamed: tuple[str, str] = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return renamed


def _operations(stream: Any) -> Iterator[tuple[str, Any, int | None]]:
    for operation, argument, position in pickletools.genops(stream):
        yield operation.name, argument, position


def hashable(key: Any) -> Any:
    """A dict key that hashes in constant time: nested tuples could take exponential time, objects have no hash."""
    return key if isinstance(key, str | int | float | bytes | Global | None) else object()


def _global(machine: PickleMachine, argument: str) -> None:
    module, name = argument.split(" ", 1)
    machine.push(machine.find(module, name))


def _stack_global(machine: PickleMachine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a class's name is no text")
    machine.push(machine.find(module, name))


def _reduce(machine: PickleMachine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, arguments))


def _newobj(machine: PickleMachine, _: Any) -> None:
    arguments, of = machine.pop(), machine.pop()
    machine.push(machine.call(of, arguments))


def _newobj_ex(machine: PickleMachine, _: Any) -> None:
    machine.pop()
    _newobj(machine, None)


def _obj(machine: PickleMachine, _: Any) -> None:
    of, *arguments = machine.pop_to_mark()
    machine.push(machine.call(of, tuple(arguments)))


def _inst(machine: PickleMachine, argument: str) -> None:
    module, name = argument.split(" ", 1)
    machine.push(machine.call(machine.find(module, name), tuple(machine.pop_to_mark())))


def _tuple_of(count: int) -> Callable[[PickleMachine, Any], None]:
    def step(machine: PickleMachine, _: Any) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return step


def _setitem(machine: PickleMachine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _append_one(machine: PickleMachine, _: Any) -> None:
    machine.append([machine.pop()])


def _dict_of_marked(machine: PickleMachine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.push({})
    machine.set_items(items)


def _drop_marked(machine: PickleMachine, _: Any) -> None:
    machine.pop_to_mark()


def _extension(machine: PickleMachine, argument: int) -> None:
    raise ValueError(f"extension code {argument} is not known here")


def _constant(value: Any) -> Callable[[PickleMachine, Any], None]:
    return lambda machine, _: machine.push(value)


def _argument(machine: PickleMachine, argument: Any) -> None:
    machine.push(argument)


def _nothing(machine: PickleMachine, _: Any) -> None:
    pass


_STEPS: dict[str, Callable[[PickleMachine, Any], None]] = {
    **dict.fromkeys(
        [
            "INT",
            "BININT",
            "BININT1",
            "BININT2",
            "LONG",
            "LONG1",
            "LONG4",
            "STRING",
            "BINSTRING",
            "SHORT_BINSTRING",
            "BINBYTES",
            "SHORT_BINBYTES",
            "BINBYTES8",
            "BYTEARRAY8",
            "UNICODE",
            "SHORT_BINUNICODE",
            "BINUNICODE",
            "BINUNICODE8",
            "FLOAT",
            "BINFLOAT",
        ],
        _argument,
    ),
    **dict.fromkeys(["PROTO", "FRAME", "READONLY_BUFFER"], _nothing),
    **dict.fromkeys(["EXT1", "EXT2", "EXT4"], _extension),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, index: machine.recall(int(index))),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], lambda machine, index: machine.remember(int(index))),
    "MEMOIZE": lambda machine, _: machine.remember_next(),
    "NEXT_BUFFER": _extension,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "MARK": _constant(_MARK),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    # a set is read as a list: its members need no hash
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": _dict_of_marked,
    "SETITEM": _setitem,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": _append_one,
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": _drop_marked,
    "DUP": lambda machine, _: machine.push(machine.top()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _newobj,
    "NEWOBJ_EX": _newobj_ex,
    "OBJ": _obj,
    "INST": _inst,
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": lambda machine, argument: machine.push(machine.persistent(argument)),
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.pop())),
}

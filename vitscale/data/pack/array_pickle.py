"""Data out of the pickles that CIFAR is published in, without unpickling: nothing is imported or called.

A pickle is a program, and the usual reader runs it. This one knows the instructions that lists, dicts,
strings and numpy's byte arrays are written with, and refuses every other by one sentence.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

Value = Any  # what a pickle holds: str, bytes, int, None, list, dict, tuple, or a numpy array
_GLOBALS = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",  # numpy 2's name for it
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
}
_TEXTS = ("SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES")
_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
_LITERALS = frozenset([*_TEXTS, *_INTEGERS])
_CONSTANTS: dict[str, Callable[[], Value]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_NO_EFFECT = frozenset(["PROTO", "STOP"])
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleRefused(ValueError):
    """The pickle holds something else than plain data and byte arrays, or is damaged."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass
class _Array:
    """An array on its way: `value` comes with its state."""

    value: np.ndarray | None = None


def read_array_pickle(data: bytes) -> Value:
    """The value of a pickle of lists, dicts, tuples, strings, numbers and uint8 arrays.

    Python 2's byte strings come as str, by latin-1. Raises PickleRefused for anything else.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            machine.execute(instruction.name, argument)
        return _finish(machine.pop())
    except PickleRefused:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PickleRefused(f"it is damaged or of another kind ({error})") from None


class _Machine:
    """The stack and memo that pickle's instructions work on."""

    def __init__(self) -> None:
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, Value] = {}

    def execute(self, name: str, argument: Value) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _TUPLE_SIZES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLE_SIZES[name])])))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in _NO_EFFECT:
            raise PickleRefused(f"it holds the instruction {name}, which plain data does not need")

    def pop(self) -> Value:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Value]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _mark(machine: _Machine, _: Value) -> None:
    machine.marks.append(len(machine.stack))


def _tuple(machine: _Machine, _: Value) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _append(machine: _Machine, _: Value) -> None:
    item = machine.pop()
    machine.stack[-1].append(item)


def _appends(machine: _Machine, _: Value) -> None:
    items = machine.pop_to_mark()
    machine.stack[-1].extend(items)


def _set_item(machine: _Machine, _: Value) -> None:
    value, key = machine.pop(), machine.pop()
    machine.stack[-1][_hashable(key)] = value


def _set_items(machine: _Machine, _: Value) -> None:
    items = machine.pop_to_mark()
    machine.stack[-1].update(
        (_hashable(key), value) for key, value in zip(items[::2], items[1::2], strict=True)
    )


def _global(machine: _Machine, name: str) -> None:
    if name not in _GLOBALS:
        raise PickleRefused(f"it asks for {name.replace(' ', '.')}, which plain data does not need")
    machine.stack.append(_Global(_GLOBALS[name]))


def _reduce(machine: _Machine, _: Value) -> None:
    arguments, function = machine.pop(), machine.pop()
    if function == _Global("dtype") and arguments[0] == "u1":
        machine.stack.append(_Global("uint8"))
    elif function == _Global("reconstruct") and arguments[0] == _Global("ndarray"):
        machine.stack.append(_Array())
    else:
        raise PickleRefused(f"it calls {function} with {str(arguments)[:60]}; only uint8 arrays are read")


def _build(machine: _Machine, _: Value) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if target == _Global("uint8"):
        return  # byte order and the like, which bytes do not have
    if not isinstance(target, _Array):
        raise PickleRefused("it sets the state of something that is not an array")
    _, shape, dtype, fortran_order, data = state
    if dtype != _Global("uint8"):
        raise PickleRefused("it holds an array that is not of uint8")
    data = data.encode("latin-1") if isinstance(data, str) else data
    target.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")


_ACTIONS: dict[str, Callable[[_Machine, Value], None]] = {
    "MARK": _mark,
    "TUPLE": _tuple,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "BUILD": _build,
}


def _hashable(key: Value) -> Hashable:
    """Keys as str, whichever Python wrote them."""
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _finish(value: Value) -> Value:
    """The finished arrays in place of those on their way; lists of labels and names hold none."""
    if isinstance(value, _Global) or (isinstance(value, _Array) and value.value is None):
        raise PickleRefused("it names an array but brings none")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _finish(item) for key, item in value.items()}
    return value

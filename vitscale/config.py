"""Configuration: frozen dataclasses, filled from TOML files and `section.key=value` overrides.

Each section is declared beside the code that reads it; this module only fills, checks and
writes them. Whatever a user gets wrong is a ConfigError, whose one sentence says what is
wrong, where, which rule it breaks, and what to write instead.
"""

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
    runtime_checkable,
)

from vitscale import toml
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, image_size

T = TypeVar("T")


@runtime_checkable
class Checked(Protocol):
    """A section that can be at any place, like [evals.NAME], and so is told its own.

    A section at a fixed place checks itself in __post_init__ instead.
    """

    def check(self, where: str) -> None:
        """Raise ConfigError for a value that does not fit. where: the section's dotted name."""


@runtime_checkable
class Upgraded(Protocol):
    """A section class that reads what earlier versions of vitscale wrote in its place."""

    def upgrade(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values as this version would have written them."""
        ...


@runtime_checkable
class HasAlternatives(Protocol):
    """A section class with keys of which one is given: a later one replaces an earlier one.

    The section stands at the top level or at a fixed place below it, not among named ones.
    """

    ALTERNATIVES: tuple[str, ...]


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths of config files and the overrides, for load, among a program's arguments."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def load(schema: type[T], paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass `schema` from TOML files, or one, and `section.key=value` overrides.

    A later file wins over an earlier one, and an override over all files. `false` in place of a
    named section leaves out the one that was given before. Raises ConfigError for a missing or
    unreadable file, an unknown key, a wrong type, or a value that a section refuses.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    return resolve(schema, map(_read_toml, map(Path, paths)), overrides)


def resolve(schema: type[T], parts: Iterable[Mapping[str, Any]], overrides: Sequence[str] = ()) -> T:
    """As load, from nested plain values in place of files."""
    merged: dict[str, Any] = {}
    for part in (*map(dict, parts), *map(_parse_override, overrides)):
        merged, part = _leave_out(schema, _drop_alternatives(schema, merged, part), part)
        merged = _merge(merged, part)
    return from_dict(schema, merged)


@overload
def from_dict(schema: type[T], values: Mapping[str, Any], where: str = "") -> T: ...
@overload
def from_dict(schema: Any, values: Mapping[str, Any], where: str = "") -> Any: ...
def from_dict(schema: Any, values: Mapping[str, Any], where: str = "") -> Any:
    """Build `schema` from nested plain values, checking every key and type.

    schema: a dataclass, or a union of dataclasses, each of which has a field like
    `kind: Literal["vit"] = "vit"`: the values' `kind` chooses among them, and without one the
    first is taken. where: the dotted name of the section, for messages.
    """
    kinds: dict[str, Any] = {member.kind: member for member in get_args(schema)}  # none of a single class
    if kinds:
        kind = values.get("kind", next(iter(kinds)))
        schema = kinds[choose(kind, tuple(kinds), dotted(where, "kind"))]
    return _build(schema, kinds, values, where)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain values of a config: what from_dict reads, with tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_toml(config: Any) -> str:
    """The whole resolved config as TOML, loadable as it is."""
    return "\n".join(toml.lines(to_dict(config))) + "\n"


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two nested dicts differ, in the order of `old`, then `new`.

    Each with its old and its new value, None where it is missing.
    """
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, dotted(where, key))
        elif a != b:
            yield dotted(where, key), a, b


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys of differences."""
    return [key for key, _, _ in differences(old, new)]


def infinite_as_zero(values: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Any]:
    """A section's values, for its `upgrade`, with 0 for inf at keys where both mean no limit.

    Earlier versions took inf, and their runs have it in their configs.
    """
    return {key: 0.0 if key in keys and value == math.inf else value for key, value in values.items()}


def positive(where: str, **values: int | float) -> None:
    """Raise ConfigError for the first of the section's `values` that is not above 0."""
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"{dotted(where, key)} {value} must be above 0")


def choose(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """The value. Raises ConfigError unless it is one of the options. where: its dotted name."""
    if value in options and type(value) in set(map(type, options)):  # True == 1, but is no choice of 1
        return value
    near = difflib.get_close_matches(str(value), list(map(str, options)), 1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise ConfigError(f"{where} {value!r} is not one of {', '.join(map(repr, options))}{hint}")


def check_choices(section: Any) -> None:
    """Raise ConfigError for a field of type Literal that has another value.

    A section with such a field calls it first in __post_init__: from_dict checks what files
    say, and this what Python code builds.
    """
    schema = type(section)
    for key, options in _literals(schema).items():
        choose(getattr(section, key), options, f"{schema.__name__}.{key}")


@functools.cache
def _literals(schema: type) -> dict[str, tuple[Any, ...]]:
    """The allowed values of each field of type Literal."""
    hints = get_type_hints(schema)
    return {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}


def check_utf8(where: str, text: str) -> None:
    """Raise ConfigError for what no file of ours can hold, like a byte of Latin-1 in a path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where} {text!a} is not UTF-8; rename it") from None


def dotted(where: str, key: str) -> str:
    """The name of a key in the section `where`; "" is the top level."""
    return f"{where}.{key}" if where else key


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return toml.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; see configs/ for those that come with vitscale"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a .toml file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None
    except ValueError:
        raise ConfigError(
            f"config file {path} has a number of thousands of digits; numbers must fit in 64 bits"
        ) from None


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, literal = text.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > toml.MAX_LEVELS:
        raise ConfigError(f"override {text!r} must read section.key=value, for example optim.lr=1e-3")
    try:
        value = toml.parse(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        value = literal  # an unquoted string, which every shell user writes
    except ValueError:
        raise ConfigError(f"{key} must fit in 64 bits") from None
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _drop_alternatives(schema: Any, merged: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """What was merged before, without the alternatives to a key that `part` sets.

    0 counts if it is set alone. A resolved config names all of them, and all but one are 0.
    """
    names = schema.ALTERNATIVES if isinstance(schema, HasAlternatives) else ()
    named = [name for name in names if name in part]
    given = any(part[name] for name in named) or 0 < len(named) < len(names)
    left = {key: value for key, value in merged.items() if not given or key not in names}
    for key, hint in get_type_hints(schema).items():
        before, now = left.get(key), part.get(key)
        if dataclasses.is_dataclass(hint) and isinstance(before, Mapping) and isinstance(now, Mapping):
            left[key] = _drop_alternatives(hint, dict(before), now)
    return left


def _leave_out(
    schema: Any, merged: dict[str, Any], part: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without the named sections that `part` leaves out, like evals.test = false."""
    for key, hint in get_type_hints(schema).items():
        sections = part.get(key)
        holds_sections = get_origin(hint) is dict and _are_sections(get_args(hint)[1])
        before = merged.get(key, {})
        if not holds_sections or not isinstance(sections, dict) or not isinstance(before, dict):
            continue  # _convert refuses what is no table
        left_out = [name for name, value in sections.items() if value is False]
        for name in left_out:
            if name not in before:
                raise ConfigError(
                    f"{dotted(key, name)} = false leaves out a section that was set before, and there is "
                    f"none of that name; there are: {', '.join(before) or 'none'}"
                )
        merged = {**merged, key: {name: value for name, value in before.items() if name not in left_out}}
        part = {**part, key: {name: value for name, value in sections.items() if name not in left_out}}
    return merged, part


def _are_sections(hint: Any) -> bool:
    """Whether a type is a dataclass, or a union of dataclasses."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return all(map(dataclasses.is_dataclass, members))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(schema: Any, kinds: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Any:
    hints, fields = get_type_hints(schema), dataclasses.fields(schema)
    values = _upgrade(schema, values)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(_unknown_key(unknown[0], list(hints), kinds, where))
    converted = {key: _convert(hints[key], value, dotted(where, key)) for key, value in values.items()}
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in converted]
    if missing:
        raise ConfigError(
            f"{dotted(where, missing[0])} is missing: it has no default, so the config must set it"
        )
    section = schema(**converted)
    if isinstance(section, Checked):
        section.check(where)
    return section


def _upgrade(schema: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema.upgrade(values) if isinstance(schema, Upgraded) else values


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # Python refuses to print long ones
        raise ConfigError(f"{where} must fit in 64 bits")
    if _are_sections(hint):
        return from_dict(hint, _expect(value, Mapping, where, "a table"), where)
    if hint == ImageSize:
        return _convert_image_size(value, where)
    if origin in (Union, types.UnionType):
        raise TypeError(f"{where}: a config field has one type, or is a union of dataclasses")
    if hint is Any:
        return _convert_json(value, where)
    if origin is Literal:
        return choose(value, args, where)
    if origin is tuple:
        items = _expect(value, list | tuple, where, "a list")
        return _convert_tuple(args, items, where)
    if origin is dict:
        table = _expect(value, Mapping, where, "a table")
        for key in table:
            check_utf8(f"{where}:", key)
        return {key: _convert(args[1], item, dotted(where, key)) for key, item in table.items()}
    return _convert_scalar(hint, value, where)  # pyright: ignore[reportArgumentType] (narrowed by the branches)


def _convert_json(value: Any, where: str) -> Any:
    try:
        json.dumps(value)
    except TypeError:
        raise ConfigError(f"{where} holds a date or a time, which JSON lacks; write it as a string") from None
    return value


def _convert_tuple(args: tuple[Any, ...], items: Sequence[Any], where: str) -> tuple[Any, ...]:
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise ConfigError(f"{where} {list(items)!r} must have {len(args)} values, not {len(items)}")
    return tuple(
        _convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, items, strict=True))
    )


def _convert_image_size(value: Any, where: str) -> ImageSize:
    """A number, or [height, width]; a square given so becomes a number, too."""
    if not isinstance(value, list | tuple):
        return _convert_scalar(int, value, where)
    height, width = _convert_tuple((int, int), value, where)
    return image_size(height, width)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if hint is not bool and isinstance(value, bool):
        raise ConfigError(f"{where} must be {names[hint]}, not {str(value).lower()}")
    if hint is int and isinstance(value, float) and value.is_integer():
        return _convert(int, int(value), where)  # 1e4 is how people write a number of steps
    if hint is float and isinstance(value, int):
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}")
    if isinstance(value, str):
        check_utf8(where, value)
    return _expect(value, hint, where, names[hint])


def _expect(value: Any, kind: Any, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{where} must be {name}, not {value!r}")
    return value


def _unknown_key(key: str, known: Sequence[str], kinds: Mapping[str, Any], where: str) -> str:
    readers = [f'"{kind}"' for kind, member in kinds.items() if key in get_type_hints(member)]
    if readers:
        return (
            f"unknown key {dotted(where, key)}: only kind = {' or '.join(readers)} reads it; "
            f"remove it or set {dotted(where, 'kind')} = {readers[0]}"
        )
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    place = f"[{where}]" if where else "the top level"
    hint = f"did you mean {dotted(where, near[0])}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {dotted(where, key)} in {place}; {hint}"

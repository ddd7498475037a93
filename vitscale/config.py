"""One config system: frozen dataclasses, filled from TOML files merged left to right and dotted overrides.

Each section is declared beside the code that reads it; this module only knows how to fill, check and write
them. What a user gets wrong is a ConfigError whose one sentence says what, where, which rule, and what to
write instead.
"""

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """The user can mend it: the message says how. Scripts print it and exit with status 2."""


def load(schema: type[T], paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass `schema` from TOML files (later ones win) and `section.key=value` overrides (they
    win over all).

    Raises ConfigError for a missing or unreadable file, an unknown key, a wrong type, or a value that a
    section refuses.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merge(merged, _read_toml(Path(path)))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return from_dict(schema, merged)


def from_dict(schema: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build `schema` from nested plain values, checking every key and type. `where` is the section's dotted
    name.
    """
    hints = get_type_hints(schema)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(_unknown_key(unknown[0], list(hints), where))
    filled = {key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(schema)  # type: ignore[arg-type]
        if field.name not in filled
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{_join(where, missing[0])} is missing: it has no default, so the config must set it"
        )
    return schema(**filled)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain values of a config: what from_dict reads, with tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_toml(config: Any) -> str:
    """The whole resolved config as TOML, loadable as it is."""
    return "\n".join(_toml_lines(to_dict(config))) + "\n"


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The dotted keys at which two nested dicts differ, in the order of `old`, then what only `new` has."""
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differing_keys(a, b, _join(where, key))
        elif a != b:
            yield _join(where, key)


def positive(where: str, **values: int | float) -> None:
    """Raise ConfigError for the first of `values` that is not above 0."""
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"{where}.{key} {value} must be above 0")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; see configs/ for those that come with vitscale"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, literal = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r} must read section.key=value, for example optim.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        value = literal  # an unquoted string, which every shell user writes
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, _expect(value, Mapping, where, "a table"), where)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], 1)
            hint_text = f'; did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f"{where} {value!r} is not one of {', '.join(map(repr, args))}{hint_text}")
        return value
    if origin is tuple:
        items = _expect(value, list | tuple, where, "a list")
        return _convert_tuple(args, items, where)
    if origin is dict:
        table = _expect(value, Mapping, where, "a table")
        return {key: _convert(args[1], item, _join(where, key)) for key, item in table.items()}
    if origin in (Union, types.UnionType):
        raise TypeError(f"{where}: config fields have one type, not a union")
    return _convert_scalar(hint, value, where)  # pyright: ignore[reportArgumentType] (narrowed by the branches)


def _convert_tuple(args: tuple[Any, ...], items: Sequence[Any], where: str) -> tuple[Any, ...]:
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(args):
        raise ConfigError(f"{where} {list(items)!r} must have {len(args)} values, not {len(items)}")
    return tuple(
        _convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, items, strict=True))
    )


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 is how people write a number of steps
    if hint is not bool and isinstance(value, bool):
        raise ConfigError(f"{where} must be {names[hint]}, not {str(value).lower()}")
    return _expect(value, hint, where, names[hint])


def _expect(value: Any, kind: Any, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{where} must be {name}, not {value!r}")
    return value


def _unknown_key(key: str, known: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    place = f"[{where}]" if where else "the top level"
    hint = f"did you mean {_join(where, near[0])}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {_join(where, key)} in {place}; {hint}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _toml_lines(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, value in values.items():
        if key not in tables:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, table in tables.items():
        dotted = _join(where, _toml_key(key))
        yield ""
        yield f"[{dotted}]"
        yield from _toml_lines(table, dotted)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml_key(k)} = {_toml_value(v)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

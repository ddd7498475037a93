"""Plain values as TOML, which the standard library reads and does not write."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def lines(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The lines of a table: its values, then the tables in it. where: its dotted name."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, entry in values.items():
        if key not in tables:
            yield f"{_key(key)} = {value(entry)}"
    for key, table in tables.items():
        name = f"{where}.{_key(key)}" if where else _key(key)
        yield ""
        yield f"[{name}]"
        yield from lines(table, name)


def value(entry: Any) -> str:
    """A value; a table is an inline one."""
    if isinstance(entry, list):
        return f"[{', '.join(map(value, entry))}]"
    if isinstance(entry, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {value(item)}' for key, item in entry.items())}}}"
    if isinstance(entry, str):
        return _string(entry)
    return repr(entry) if isinstance(entry, float) else json.dumps(entry)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _string(key)


def _string(text: str) -> str:
    """A basic string: JSON's, but TOML has no surrogate pairs, and no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

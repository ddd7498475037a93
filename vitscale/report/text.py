"""How the reports write their values: tables, sizes, ages, and JSON."""

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Fields whose JSON key is another word, which scripts may rely on.
_JSON_KEYS = {"slot": "state", "slots": "states", "untrained": "fixed", "status": "state"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The lines of a table with columns as wide as needed; those in `left` are aligned left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if column in left else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def json_values(record: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, under their JSON keys."""
    return dataclasses.asdict(
        record, dict_factory=lambda items: {_JSON_KEYS.get(name, name): value for name, value in items}
    )


def to_json(values: Any) -> str:
    """Strict JSON: numbers that it cannot write become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(values), indent=1, allow_nan=False, ensure_ascii=False)


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def damaged_newest(step: int, good: int | None) -> str:
    """What `list` and `verify` say in the end of a run whose newest checkpoint is damaged.

    good: the newest step that verifies, if there is one.
    """
    rest = "no other verifies" if good is None else f"training would resume from step {good:,}"
    return (
        f"the newest checkpoint, step {step:,}, is damaged, and {rest}; restore its files from a copy, "
        "or delete its folder"
    )


def when(created: str, now: datetime.datetime) -> tuple[str, str]:
    """A manifest's time as local time, and its age; what is not a time stays as it is."""
    try:
        moment = datetime.datetime.fromisoformat(created)
        seconds = (now - moment).total_seconds()
        local = f"{moment.astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, TypeError, OverflowError):
        return created, ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return local, f"{seconds / length:.0f} {unit}"
    return local, f"{max(0.0, seconds):.0f} s"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""The health of a run's data: samples that were replaced, and losses that stand out, with the
pictures of those samples as the shards hold them now.
"""

from collections.abc import Mapping
from typing import Any

from vitscale.guard.spikes import FILE_NAME as SPIKES_NAME
from vitscale.report.page.html import Html, details, element, joined, note, table
from vitscale.report.page.pictures import card, gallery
from vitscale.report.page.records import Record
from vitscale.report.page.scale import short
from vitscale.report.page.shards import Shards

MAX_ROWS, MAX_PICTURES = 200, 24  # of different samples that were replaced
MAX_SPIKES, SPIKES_WITH_PICTURES, PICTURES_OF_SPIKE = 50, 3, 8
PLACES_OF_SPIKE = 32  # of the samples of a global batch


def data_health(record: Record, shards: Shards) -> Html:
    """Replaced samples and losses that stand out, and why there are no pictures of them."""
    parts = []
    if shards.problem and (record.quarantine or record.spikes):
        parts.append(note(f"There are no pictures of samples: {shards.problem}."))
    return joined([*parts, quarantine(record, shards), spikes(record, shards)])


def quarantine(record: Record, shards: Shards) -> Html:
    """The samples that could not be used, each once, with the steps at which it was drawn."""
    replaced = record.quarantine
    if not replaced:
        return note("No sample had to be replaced.")
    rows = []
    looked_at = 0 if shards.problem else MAX_PICTURES
    for number, (sentence, sample) in enumerate(list(replaced.items())[:MAX_ROWS]):
        shown = shards.look(sentence)[0] if number < looked_at else ""
        place, _, reason = sentence.partition(": sample ")
        key, _, why = reason.partition(": ")
        first, last = f"{sample.first_step:,}", f"{sample.last_step:,}"
        seen = first if sample.times == 1 else f"{first} to {last}"
        rows.append([_wide(key or "?"), shown, _wide(why), _wide(place), f"{sample.times:,}", seen])
    times = sum(sample.times for sample in replaced.values())
    caption = f"{len(replaced):,} different samples were replaced, {times:,} times in all"
    if len(replaced) > MAX_ROWS:
        caption += f"; the first {MAX_ROWS:,} are shown"
    header = ["key", "as it is now", "reason", "place", "times", "by step"]
    return table(header, rows, caption=caption, right=(4,))


def spikes(record: Record, shards: Shards) -> Html:
    """The steps whose loss stands out, with the samples that they trained on."""
    if not record.spikes:
        return note("No loss stood out.")
    rows = [_spike(row) for row in record.spikes[-MAX_SPIKES:]]
    caption = f"{len(record.spikes):,} losses stand out"
    if len(record.spikes) > MAX_SPIKES:
        caption += f"; the last {MAX_SPIKES:,} are shown"
    header = ["step", "loss", "median before", "deviations above", "samples"]
    parts = [table(header, rows, caption=caption, right=(0, 1, 2, 3))]
    for row in () if shards.problem else record.spikes[-SPIKES_WITH_PICTURES:]:
        places = [str(place) for place in _samples(row)[:PICTURES_OF_SPIKE]]
        cards = [card(shown, key) for shown, key in map(shards.look, places)]
        parts += [element("h4", f"Samples of step {row['step']:,}, the first {len(cards)}"), gallery(cards)]
    return joined(parts)


def _spike(row: Mapping[str, Any]) -> list[str]:
    loss, median, deviation = (_number(row.get(name)) for name in ("loss", "median", "deviation"))
    above = f"{(loss - median) / deviation:.3g}" if deviation > 0 else ""
    places = _samples(row)
    lines = [str(place) for place in places[:PLACES_OF_SPIKE]]
    if more := len(places) - len(lines):
        lines.append(f"{more:,} more in {SPIKES_NAME}")
    listed = details(f"{len(places):,} samples", element("pre", "\n".join(lines)))
    return [f"{row['step']:,}", short(loss), short(median), above, listed]


def _samples(row: Mapping[str, Any]) -> list[Any]:
    samples = row.get("samples")
    return samples if isinstance(samples, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _wide(text: str) -> Html:
    return element("span", text, class_="wide")

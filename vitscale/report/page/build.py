"""The whole page: its sections in order, and the file that they become."""

import base64
import datetime
import hashlib
from collections.abc import Callable, Sequence

from vitscale.report.page import course, curves, damage, overview, samples
from vitscale.report.page.html import Html, details, element, joined, unless_unreadable
from vitscale.report.page.records import Record, read_records
from vitscale.report.page.shards import Shards
from vitscale.report.page.style import CSS, SCRIPT
from vitscale.system import atomic


def write_page(runs: str | Sequence[str], out: str, *, with_images: bool = True) -> int:
    """Write the page of a run, or of several, whole or not at all; returns its bytes.

    with_images: look at the data and at a checkpoint, for pictures. Raises ConfigError for what
    is no run directory, and as atomic.check_writable does.
    """
    atomic.check_writable(out, ".html")
    runs = [runs] if isinstance(runs, str) else runs
    records = read_records(list(dict.fromkeys(runs)))
    content = page(records, datetime.datetime.now(datetime.UTC), with_images=with_images).encode()
    atomic.write(out, content)
    return len(content)


def page(records: Sequence[Record], now: datetime.datetime, *, with_images: bool) -> str:
    """The page as text."""
    shards = {record.path: Shards(record, with_images=with_images) for record in records}
    sections = [
        ("Expectations", curves.expectations(records)),
        ("Curves", curves.curves(records)),
        ("Throughput", curves.speed(records)),
        ("Where the time went", _of_each(records, course.time_spent)),
        ("Evaluations", _of_each(records, curves.evaluations)),
        ("Starts", _of_each(records, course.starts)),
        ("Data", _of_each(records, lambda record: damage.data_health(record, shards[record.path]))),
        ("Checkpoints", _of_each(records, lambda record: course.checkpoints(record, now))),
    ]
    if with_images:
        sections += [
            ("Model inputs", _of_each(records, lambda record: _inputs(record, shards[record.path]))),
            ("Predictions", _of_each(records, _predictions)),
        ]
    if len(records) > 1:
        sections.append(("What differs", overview.differences(records)))
        config = joined(details(record.name, overview.config_text(record)) for record in records)
    else:
        config = overview.config_text(records[0])
    sections.append(("Config", config))
    shown = [(title, content) for title, content in sections if content]
    links = (element("li", element("a", title, href=f"#{_anchor(title)}")) for title, _ in shown)
    nav = element("nav", element("ul", *links), aria_label="Sections")
    parts = (element("section", element("h2", title), content, id=_anchor(title)) for title, content in shown)
    body = element(
        "body",
        element("header", overview.header(records, now), nav),
        element("main", overview.overview(records), *parts),
        element("footer", "Made by tools/report.py of vitscale. The page needs no network."),
        element("script", Html(SCRIPT)),
    )
    title = f"{', '.join(record.name for record in records)}: vitscale run"
    return f"<!DOCTYPE html>\n{element('html', _head(title), body, lang='en')}\n"


def _head(title: str) -> Html:
    """The head of the page, which lets only its own script run, and nothing be loaded."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(CSS)),
    )


def _of_each(records: Sequence[Record], make: Callable[[Record], Html]) -> Html:
    """A part of every run, under its name where there are several."""
    if len(records) == 1:
        return make(records[0])
    parts = [(record.name, make(record)) for record in records]
    return joined(joined([element("h3", name), part]) for name, part in parts if part)


def _inputs(record: Record, shards: Shards) -> Html:
    return unless_unreadable(lambda: samples.inputs(record, shards), "The inputs cannot be shown")


def _predictions(record: Record) -> Html:
    return unless_unreadable(lambda: samples.predictions(record), "There are no predictions")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")

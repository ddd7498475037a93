"""Markup by construction: what is not Html is text, and is escaped where it enters markup.

All text that a run directory holds (class names, sample keys, config values, reasons) passes
through here, so that none of it can become markup, break the encoding or show a secret.
"""

import html
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from vitscale.errors import UserError
from vitscale.redaction import redact

_VOID = ("img", "meta", "br")
# Control characters, lone surrogates, and what turns the direction of the text around it.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup, which may be put into other markup as it is."""


def escaped(text: str) -> Html:
    """Text as markup; Html stays as it is."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(redact(_UNSHOWABLE.sub("\ufffd", text))))


def joined(parts: Iterable[str]) -> Html:
    """Parts of markup or text, one after the other."""
    return Html("".join(map(escaped, parts)))


def element(tag: str, *parts: str, **attributes: str | int | float) -> Html:
    """An element of HTML or SVG.

    parts: markup, or text. attributes: `class_` is class and `aria_label` is aria-label; False
    leaves one out, and True gives it without a value.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items() if value is not False)
    end = "" if tag in _VOID else f"{joined(parts)}</{tag}>"
    return Html(f"<{tag}{written}>{end}")


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, right: Collection[int] = ()
) -> Html:
    """A table that scrolls in its own box where it is too wide for the screen.

    The first cell of each row is its header. right: columns that are aligned right, as numbers.
    """
    classes = ["number" if column in right else "" for column in range(len(header))]
    head = [element("th", cell, scope="col", class_=name) for cell, name in zip(header, classes, strict=True)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=classes[0]),
            *(element("td", cell, class_=name) for cell, name in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    ]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *parts: str) -> Html:
    """Parts that open on a click, and in print are as they stand."""
    return element("details", element("summary", summary), *parts)


def note(text: str) -> Html:
    return element("p", text, class_="note")


def unless_unreadable(make: Callable[[], Html], instead: str) -> Html:
    """What `make` returns, or a sentence with the reason where it cannot read what it needs.

    instead: how the sentence begins, like "The inputs are not shown".
    """
    try:
        return make()
    except (UserError, OSError) as error:
        return note(f"{instead}: {reason(error)}.")


def reason(error: Exception) -> str:
    """Why something cannot be read, for the end of a sentence."""
    if isinstance(error, OSError):
        return f"{error.filename or 'reading'}: {error.strerror or error}"
    return str(error)


def _attribute(name: str, value: str | int | float) -> str:
    key = name.removesuffix("_").replace("_", "-")
    if value is True:
        return f" {key}"
    if value == "" and key == "class":
        return ""
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key}="{escaped(text)}"'

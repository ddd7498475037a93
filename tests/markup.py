"""What every page must be: well-formed, complete in itself, and without markup from outside."""

import html.parser
import re
import xml.etree.ElementTree as ElementTree

VOID = {"meta", "img", "br"}
SVG = re.compile(r"<svg\b.*?</svg>", re.DOTALL)


class Page(html.parser.HTMLParser):
    """A parsed page. Raises AssertionError where an element is not closed in its turn."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def values(self, attribute: str) -> list[str]:
        return [values[attribute] or "" for _, values in self.tags if attribute in values]


def outside_references(page: Page, content: str) -> list[str]:
    """What the page would load, or run, from elsewhere than itself."""
    references = [
        value for name in ("src", "srcset", "data", "action", "xlink:href") for value in page.values(name)
    ]
    found = [value for value in references if not value.startswith("data:image/")]
    found += [value for value in page.values("href") if not value.startswith("#")]
    found += [name for _, values in page.tags for name in values if name.startswith("on")]
    found += [
        tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form", "image")
    ]
    found += re.findall(r"@import|url\(", content)
    return found


def checked(content: str) -> Page:
    """The page, which is well-formed, one of ours, and needs nothing but itself."""
    page = Page(content)
    assert outside_references(page, content) == []
    assert page.count("script") == page.count("style") == page.count("h1") == page.count("main") == 1
    for svg in SVG.findall(content):
        ElementTree.fromstring(svg)
    assert all(values.get("alt") for tag, values in page.tags if tag == "img")
    assert page.count("table") == page.count("caption")
    links = [value.removeprefix("#") for value in page.values("href")]
    assert len(set(links)) == len(links) and set(links) <= set(page.values("id"))
    return page

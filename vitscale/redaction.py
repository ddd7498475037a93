"""What may be printed of a text that others wrote, like a URL, or a name in a shard.

The user and the query of a URL may be secrets, like a signature. Control characters could
rewrite what a terminal shows, or its title.
"""

import re

_USER = re.compile(r"(https?://)[^/\s'\"?]*@", re.IGNORECASE)
# A query ends before a blank or a quote, and before the punctuation of the sentence around it.
_QUERY = re.compile(r"(https?://[^\s'\"?]*\?)[^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))", re.IGNORECASE)
# All but tab and newline, and those that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """The text without users and queries of HTTP URLs, its control characters as escapes."""
    text = _QUERY.sub(r"\1***", _USER.sub(r"\1", text))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)

"""What may be printed of a URL: its user and its query may be secrets, like a signature."""

import re

_USER = re.compile(r"(https?://)[^/\s'\"?]*@", re.IGNORECASE)
# A query ends before a blank or a quote, and before the punctuation of the sentence around it.
_QUERY = re.compile(r"(https?://[^\s'\"?]*\?)[^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))", re.IGNORECASE)


def redact(text: str) -> str:
    """The text without the users and queries of its HTTP URLs."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1", text))

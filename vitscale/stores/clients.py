"""fsspec's clients of stores, one for each process, without retries of their own."""

import functools
from typing import Any

import fsspec

CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 10, 30


@functools.cache
def client(name: str, process: int, is_signed: bool = False) -> Any:
    """The fsspec file system of a scheme in one process.

    is_signed: send HTTP URLs as they are, without another percent-encoding of the query.

    A client does not survive a fork, so every process makes its own. A worker keeps its
    parent's as well, unused: finalising it would take the parent's open connections out of the
    epoll set that the two share, and the parent would wait for answers until its timeout.
    """
    fs = fsspec.filesystem(name, skip_instance_cache=True, **_client_options(name, is_signed))
    fs.retries = 1
    return fs


def _client_options(name: str, is_signed: bool) -> dict[str, Any]:
    if name == "s3":
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS}
        # What we write has our own checksums. The client's are wrong for ranges at some.
        checksums = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        return {"config_kwargs": {"retries": {"max_attempts": 0}, **timeouts, **checksums}}
    if name in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS
        )
        return {"client_kwargs": {"timeout": timeout}, "encoded": is_signed}
    return {}

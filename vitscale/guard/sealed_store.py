"""A store of torch's in which only the ranks of a job write, though anyone may connect to it.

torch's store has no password, and lists its keys for whoever asks. So the names in it are
digests, which nobody makes without the secret of the job, and each value begins with a digest
of itself:

    "stop" -> "maintenance"    is    "3f0c..." -> "a91e...maintenance"

What is written by somebody else counts as absent. Values can be read by anyone.
"""

import datetime
import hashlib
import hmac
import logging
from collections.abc import Sequence

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

SECRET_BYTES = 32
DIGEST_LETTERS = 32


class SealedStore:
    """The entries of a store that were written with the secret.

    Raises RuntimeError, as torch does, if the store is gone.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store, self._secret = store, secret
        self._warned = False

    def set(self, name: str, text: str) -> None:
        self._store.set(self._digest(name), self._digest(name, text) + text)

    def get(self, name: str) -> str | None:
        """The text of an entry, or None if there is none."""
        return self.get_all([name])[0] if self._store.check([self._digest(name)]) else None

    def get_all(self, names: Sequence[str]) -> list[str | None]:
        """The texts of entries, in one request that waits until each of them is there."""
        values = self._store.multi_get([self._digest(name) for name in names])
        return [self._opened(name, value) for name, value in zip(names, values, strict=True)]

    def wait(self, names: Sequence[str], timeout: datetime.timedelta) -> None:
        """Wait for entries. Raises RuntimeError if they do not come within the timeout."""
        self._store.wait([self._digest(name) for name in names], timeout)

    def _digest(self, *parts: str) -> str:
        message = "\0".join(parts).encode()
        return hashlib.blake2b(message, key=self._secret, digest_size=DIGEST_LETTERS // 2).hexdigest()

    def _opened(self, name: str, value: bytes) -> str | None:
        text = value[DIGEST_LETTERS:].decode(errors="replace")
        if hmac.compare_digest(value[:DIGEST_LETTERS], self._digest(name, text).encode()):
            return text
        if not self._warned:
            self._warned = True
            logger.warning(
                "the watchdog's store has an entry that no rank of this job wrote; it is passed over, but "
                "somebody else reaches the ports of this host: close them (docs/clusters.md)"
            )
        return None

"""Where ranks meet: a fresh store for each attempt of torchrun, also after a restart.

torchrun keeps one store for all attempts (torch 2.13: always with the static backend; with c10d
unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set, as it must be where machines join). gloo then
finds the addresses of the ranks of the attempt before, which are dead, and waits. Here rank 0
of each attempt starts a store of its own, and the agents' store only tells where it is:

    agents' store    "vitscale/store" = "10.0.0.7 40123 8d1f03ac"     (address, port, token)
    rank 0's store   "token" = "8d1f03ac"

A rank that reads the address of the attempt before finds nobody there, or another token, and
reads again: rank 0 writes the new one within moments.
"""

import datetime
import os
import re
import secrets
import socket
import time

from torch.distributed import DistError, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from vitscale.errors import ConfigError, RankLost, UserError

KEY = "vitscale/store"
RETRY_SECONDS = 0.2
CONNECT_TIMEOUT = datetime.timedelta(seconds=5)


def own_store(timeout: datetime.timedelta) -> Store | None:
    """The store in which this attempt's ranks meet; None where torch's way will do.

    Every rank calls it. Raises DistError if the others do not come within the timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = TCPStore(address, port, is_master=False, timeout=timeout)
    if os.environ["RANK"] == "0":
        own = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        token = secrets.token_hex(4)
        own.set("token", token)
        agents.set(KEY, f"{address_here()} {own.port} {token}")
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port_there, token = agents.get(KEY).decode().split()
        try:
            own = TCPStore(host, int(port_there), is_master=False, timeout=CONNECT_TIMEOUT)
            if own.get("token").decode() == token:
                own.set_timeout(timeout)
                return own
        except DistError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_SECONDS)


def address_here() -> str:
    """An address of this machine that all machines reach which reach MASTER_ADDR."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection((address, port)) as connection:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    return address if here == there else here  # the same: the agents' store is on this machine


def explained(error: DistError, timeout: datetime.timedelta) -> UserError | None:
    """What a user should read where ranks could not meet; None for what we know no better."""
    if found := re.search(r"(\d+)/(\d+) clients joined", str(error)):
        return RankLost(
            f"{found[1]} of {found[2]} ranks came within {timeout.seconds // 60} minutes; the logs of the "
            "other hosts may say why, and the same command tries again"
        )
    if "EADDRINUSE" not in str(error):
        return None
    port = os.environ["MASTER_PORT"]
    return ConfigError(
        f"port {port} of {socket.gethostname()}, where the ranks meet, is taken by another program; choose "
        "another one: --master_port N for deepspeed and torchrun, else MASTER_PORT=N"
    )


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

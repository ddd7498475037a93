"""How fast, and whether at all, plain TCP goes from each host to the next one."""

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

from vitscale.cluster.preflight.compare import Facts

SECONDS = 0.4
TIMEOUT_SECONDS = 5.0
PIECE = bytes(1 << 20)


def address_here() -> str:
    """This host's address for the others: of gloo's interface, if one is chosen."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for entry in psutil.net_if_addrs().get(interface, []):
        if entry.family == socket.AF_INET:
            return entry.address
    if connection := os.environ.get("SSH_CONNECTION"):  # "client port server port"
        return connection.split()[2]
    try:
        other = os.environ.get("MASTER_ADDR", "")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((other or socket.gethostname(), 9))
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"


def missing_interface() -> str:
    """The first interface that gloo is told to use and this host lacks; "" = there is none."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    here = psutil.net_if_addrs()
    return next((name for name in chosen if name and name not in here), "")


def leads_to_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


class _Endpoint(NamedTuple):
    """Where a host takes a connection."""

    host: str
    address: str
    port: int


def with_speed(facts: Facts, place: int, gather: Callable[[Any], list[Any]]) -> Facts:
    """The facts with the speed from the host before this one; every host calls it at once.

    Each host sends to the next and the last to the first, so that the time is the same for any
    number of hosts.
    """
    family = socket.AF_INET6 if ":" in facts.address else socket.AF_INET
    speed, refused = 0.0, ""
    with socket.socket(family) as listener:
        own = _listen(listener, facts)
        endpoints = gather(own)
        later_and_earlier = (*endpoints[place + 1 :], *endpoints[:place])
        following = next((_Endpoint(*other) for other in later_and_earlier if other), None)
        if own and following:  # a host that cannot listen does not send: the one after it gets nothing
            receiver = _Receiver(listener)
            receiver.start()
            refused = _send(facts.host, following)
            receiver.join()
            speed = receiver.speed
        gather("measured")  # all listen until all have sent
    return dataclasses.replace(facts, speed=speed, refused=refused)


def _listen(listener: socket.socket, facts: Facts) -> _Endpoint | None:
    """Listen at the host's address; None if that is impossible."""
    listener.settimeout(TIMEOUT_SECONDS + SECONDS)
    try:
        listener.bind((facts.address, 0))
        listener.listen()
        return _Endpoint(facts.host, facts.address, listener.getsockname()[1])
    except OSError:
        return None


class _Receiver(threading.Thread):
    """Takes one connection, and counts what comes."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(name="receiver", daemon=True)
        self.speed = 0.0
        self._listener = listener

    def run(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(TIMEOUT_SECONDS)
                began, received = time.monotonic(), 0
                while piece := connection.recv(len(PIECE)):
                    received += len(piece)
                self.speed = received / (time.monotonic() - began)
        except OSError:
            pass  # the sender says why


def _send(sender: str, to: _Endpoint) -> str:
    """Send for a while. Returns why it was impossible; "" if it was not. sender: its name."""
    try:
        with socket.create_connection((to.address, to.port), TIMEOUT_SECONDS) as connection:
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                connection.sendall(PIECE)
    except OSError as error:
        return (
            f"{sender} cannot connect to {to.host} at {to.address}: {error}; let the hosts reach one another "
            "on all ports, and set GLOO_SOCKET_IFNAME to the interface of an address that they share"
        )
    return ""

"""A loopback proxy that spoils a share of HTTP requests: fault_proxy.py PORT TARGET MODE SHARE.

MODE is one of:
    reset  the connection is reset before the request is passed on
    cut    it is reset after 5 kB of the answer
    stall  the request is never answered
    wrong  one byte of the body is changed, 5 kB after the answer's beginning
    four   as wrong, but for the first four requests of every range, whatever SHARE is
"""

import asyncio
import collections
import random
import re
import socket
import struct
import sys

CUT_BYTES = 5_000
SPOILED_FIRST = 4  # in mode "four"
METHODS = (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE")


class Connection:
    """A client's connection: requests are passed to the target, and its answers back."""

    def __init__(
        self, target: int, mode: str, share: float, draws: random.Random, asked: collections.Counter[bytes]
    ) -> None:
        self.target, self.mode, self.share, self.draws, self.asked = target, mode, share, draws, asked
        self.passed, self.spoiled = 0, False

    def spoils(self, request: bytes) -> bool:
        """Whether to spoil a request. In mode "four", `asked` counts those of each range."""
        if self.mode != "four":
            return self.draws.random() < self.share
        asked_for = request.split(b"\r\n", 1)[0] + b"".join(re.findall(rb"(?i)\r\nrange:.*", request))
        self.asked[asked_for] += 1
        return self.asked[asked_for] <= SPOILED_FIRST

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            while data := await reader.read(65536):
                if data.split(b" ", 1)[0] in METHODS:
                    self.passed, self.spoiled = 0, self.spoils(data)
                if self.spoiled and self.mode == "reset":
                    return reset(writer)
                if self.spoiled and self.mode == "stall":
                    await asyncio.sleep(3600)
                if upstream is None:
                    answers, upstream = await asyncio.open_connection("127.0.0.1", self.target)
                    self.answering = asyncio.create_task(self.answer(answers, writer))
                upstream.write(data)
                await upstream.drain()
        except ConnectionError:
            pass
        finally:
            if upstream:
                upstream.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            start, self.passed = self.passed, self.passed + len(data)
            if self.spoiled and self.mode == "cut" and self.passed > CUT_BYTES:
                writer.write(data[: max(0, CUT_BYTES - start)])
                return reset(writer)
            if self.spoiled and self.mode in ("wrong", "four") and start <= CUT_BYTES < self.passed:
                wrong = CUT_BYTES - start
                data = data[:wrong] + bytes([data[wrong] ^ 1]) + data[wrong + 1 :]
            writer.write(data)
            await writer.drain()
        writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main(port: int, target: int, mode: str, share: float) -> None:
    draws, asked = random.Random(0), collections.Counter[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Connection(target, mode, share, draws, asked).serve(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))

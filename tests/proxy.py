"""Trouble on the way to a real server: a TCP proxy that passes everything on until it is told otherwise."""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

ANSWERS = {
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your rate."),
    "no_upload": ("404 Not Found", "NoSuchUpload", "The upload does not exist."),
    "skewed": ("403 Forbidden", "RequestTimeTooSkewed", "The request time and the current time differ too much."),
}
"""What the proxy itself says in place of the server, as S3 says it."""
METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


class FaultProxy:
    """Stands before an HTTP server, in a thread of its own.

    The faults: `refuse` (no connection is made), `reset` (the answer breaks off half-way), `stall` (it stops there, and
    the connection stays), `half` (so does the request), `silent` (nothing of it gets through), `slow` (answers come at
    `rate`), and those of `ANSWERS`, which the proxy gives itself. `set` holds until the next one, `plan` is for one
    request. `counts` says how often each was done.
    """

    rate = 200_000
    """Bytes a second of each slow answer."""

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint)
        self._target = (target.hostname, target.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._plans: list[_Plan] = []
        self._mode, self._parts, self._port = "", list[bytes](), 0
        self.counts: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        """What clients are told instead of the server's own."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, fault: str = "", *parts: str) -> None:
        """What happens to every connection and request from now on; nothing if no fault is named.

        Args:
            fault: see the class.
            parts: of a request's first line, such as its method and the object's name: other requests pass.
        """
        self._mode, self._parts = fault, [part.encode() for part in parts]
        if fault and not parts:
            self._call(self._refuse())  # open connections end, as with a server that goes
        if fault != "refuse" or parts:
            self._call(self._listen())

    def plan(self, *faults: str, path: str = "") -> None:
        """What happens in turn to one request (GET) for an object with `path` in its name, and to its repetitions."""
        self._plans.append(_Plan(deque(faults), path.encode()))

    @property
    def planned(self) -> int:
        """How many of these are still to come."""
        return sum(len(plan.faults) for plan in self._plans)

    def _fault(self, request: bytes) -> str:
        lines = request.split(b"\r\n")
        if self._mode and all(part in lines[0] for part in self._parts):
            return self._mode
        if self._mode or not request.startswith(b"GET "):
            return ""
        asked = b"".join([lines[0], *(line for line in lines if line.lower().startswith(b"range:"))])
        for plan in self._plans:
            if plan.faults and plan.path in lines[0] and plan.asked in (b"", asked):
                plan.asked = asked
                return plan.faults.popleft()
        return ""

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            _reset(writer)

    async def _end(self) -> None:
        await self._refuse()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._open.add(client)
        connection = _Connection()
        answers = None
        try:
            if self._mode != "silent" or self._parts:
                back, server = await asyncio.open_connection(*self._target)
                answers = asyncio.ensure_future(_pass(back, client, connection, self.rate))
                await self._requests(reader, client, server, connection)
                server.close()
            else:
                await self._requests(reader, client, None, connection)
        except OSError:  # one of the two has gone
            _reset(client)
        finally:
            self._open.discard(client)
            client.close()
            if answers:
                answers.cancel()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        server: asyncio.StreamWriter | None,
        connection: "_Connection",
    ) -> None:
        while data := await reader.read(1 << 16):
            begins = data.startswith(METHODS)  # a client waits for the answer before it asks for more
            if begins:
                connection.fault, connection.left, connection.sent = self._fault(data), -1, _half(data)
                self.counts[connection.fault or "pass"] += 1
            if connection.fault == "refuse":
                _reset(client)
            elif connection.fault in ANSWERS:  # what else is sent goes nowhere
                if begins:
                    client.write(_answer(connection.fault, head=data.startswith(b"HEAD ")))
                    await client.drain()
            elif server is not None and connection.fault != "silent":
                if connection.fault == "half":
                    data, connection.sent = data[: connection.sent], max(0, connection.sent - len(data))
                server.write(data)
                await server.drain()


@dataclass
class _Plan:
    faults: deque[str]
    path: bytes
    asked: bytes = b""
    """Which request it is about; empty while it is still to come."""


@dataclass
class _Connection:
    """What is to happen to the answer that is under way."""

    fault: str = ""
    left: int = -1
    """How many bytes of it get through; below 0 until its head has come."""
    sent: int = 0
    """How many bytes of a request get through, if half of it is to."""


async def _pass(
    server: asyncio.StreamReader, client: asyncio.StreamWriter, connection: _Connection, rate: float
) -> None:
    """Sends the server's answers on, or the first part of one."""
    with contextlib.suppress(OSError):
        while data := await server.read(1 << 16 if connection.fault != "slow" else 1 << 12):
            if connection.fault == "slow":
                await asyncio.sleep(len(data) / rate)
            if connection.fault in ("reset", "stall"):
                if connection.left < 0:
                    connection.left = _half(data)
                data, connection.left = data[: connection.left], max(0, connection.left - len(data))
            client.write(data)
            await client.drain()
            if connection.fault == "reset" and not connection.left:
                _reset(client)
        client.close()


def _answer(fault: str, *, head: bool) -> bytes:
    """What the proxy says itself; the answer to HEAD has no body."""
    status, code, message = ANSWERS[fault]
    body = "" if head else f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", "Connection: close", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


def _half(message: bytes) -> int:
    """Bytes of its head and half of its body."""
    head, _, _ = message.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return len(head) + 4 + (int(length[1]) // 2 if length else 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection as a crash does: without a goodbye."""
    connected = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

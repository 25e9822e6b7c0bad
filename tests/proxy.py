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

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


class FaultProxy:
    """Stands before an HTTP server, in a thread of its own.

    The faults: `refuse` (no connection is made), `reset` (the answer breaks off half-way), `stall` (it stops there, and
    the connection stays), `silent` (no answer at all), `slow_down` (503). `set` holds until the next one, `plan` is for
    a single request. `counts` says how often each was done.
    """

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint)
        self._target = (target.hostname, target.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._plans: list[_Plan] = []
        self._mode, self._port = "", 0
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

    def set(self, fault: str = "") -> None:
        """What happens to every connection and request from now on; nothing if no fault is named."""
        self._mode = fault
        self._call(self._refuse() if fault else self._listen())  # open connections end, as with a server that goes
        if fault and fault != "refuse":
            self._call(self._listen())

    def plan(self, *faults: str, path: str = "") -> None:
        """What happens in turn to one request (GET) for an object with `path` in its name, and to its repetitions."""
        self._plans.append(_Plan(deque(faults), path.encode()))

    @property
    def planned(self) -> int:
        """How many of these are still to come."""
        return sum(len(plan.faults) for plan in self._plans)

    def _fault(self, request: bytes) -> str:
        if self._mode or not request.startswith(b"GET "):
            return self._mode
        lines = request.split(b"\r\n")
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
            if self._mode != "silent":
                back, server = await asyncio.open_connection(*self._target)
                answers = asyncio.ensure_future(_pass(back, client, connection))
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
            if data.startswith(METHODS):  # a client waits for the answer before it asks for more
                connection.fault, connection.left = self._fault(data), -1
                self.counts[connection.fault or "pass"] += 1
            if connection.fault == "slow_down":
                if data.startswith(METHODS):
                    body = b"" if data.startswith(b"HEAD ") else SLOW_DOWN
                    head = "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                    client.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    await client.drain()
                continue  # what else is sent goes nowhere
            if server is not None and connection.fault != "silent":
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


async def _pass(server: asyncio.StreamReader, client: asyncio.StreamWriter, connection: _Connection) -> None:
    """Sends the server's answers on, or the first part of one."""
    with contextlib.suppress(OSError):
        while data := await server.read(1 << 16):
            if connection.fault in ("reset", "stall"):
                if connection.left < 0:
                    connection.left = _half(data)
                data, connection.left = data[: connection.left], max(0, connection.left - len(data))
            client.write(data)
            await client.drain()
            if connection.fault == "reset" and not connection.left:
                _reset(client)
        client.close()


def _half(answer: bytes) -> int:
    """Bytes of its head and half of its body."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return len(head) + 4 + (int(length[1]) // 2 if length else 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection as a crash does: without a goodbye."""
    connected = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

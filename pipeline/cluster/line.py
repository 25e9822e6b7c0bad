"""What driver and workers say to each other; a module of its own, as its process imports nothing else."""

import asyncio
from typing import NamedTuple


class Said(NamedTuple):
    """One line of the console."""

    line: str
    step: int | None = None
    """Steps done, if the line is about how far the run is."""
    brief: str = ""
    """The same where there is room for little."""


class Line:
    """An actor on the driver's node."""

    def __init__(self) -> None:
        self._said, self._any = list[Said](), asyncio.Event()
        self._stop, self._waiting = asyncio.Event(), 0

    async def say(self, said: Said) -> None:
        """Called by workers and the controller."""
        self._said.append(said)
        self._any.set()

    async def heard(self) -> list[Said]:
        """What was said since the last call; waits for it."""
        await self._any.wait()
        said, self._said = self._said, []
        self._any.clear()
        return said

    async def stop(self) -> bool:
        """Asks the workers to stop; whether any of them listens."""
        self._stop.set()
        return self._waiting > 0

    async def is_stopping(self) -> bool:
        """Whether they were asked."""
        return self._stop.is_set()

    async def stopping(self) -> None:
        """Returns when they are; rank 0 waits for it."""
        self._waiting += 1
        try:
            await self._stop.wait()
        finally:
            self._waiting -= 1

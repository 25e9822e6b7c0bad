"""A page on this machine that shows what a trained network sees in a photo: its mask, its doubt, and which classes."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

from pipeline.datasets.images import DecodeError, decode_part, notes_rotation, read_header
from pipeline.errors import UserError
from pipeline.inference.load import Model
from pipeline.inference.pictures import colour_mask, heat, overlay
from pipeline.ops.entropy import relative_entropy
from pipeline.report.render import jpeg_uri, png_uri, render

MAX_BYTES = 32 << 20
"""Larger files are refused."""
MAX_SIDE = 2048
"""Larger photos are shrunk to that before the network, as their logits would fill the memory of a small machine."""


@dataclass(frozen=True)
class Share:
    """What a photo shows of one class."""

    name: str
    color: tuple[int, int, int]
    """RGB, 0..255"""
    share: float
    """0..1 of the pixels."""


@dataclass(frozen=True)
class Seen:
    """What the network sees in one photo; pictures are places that a page holds in itself."""

    width: int
    height: int
    """Of the pictures, pixels."""
    overlay: str
    mask: str
    entropy: str
    photo: str
    classes: Sequence[Share]
    """Those that it shows, the largest first."""
    notes: Sequence[str]
    """What was done to the photo, or not, in words."""


def look(model: Model, data: bytes) -> Seen:
    """Runs the network on an image file, as the evaluation of its run does.

    Raises:
        DecodeError: it is no image that the project reads.
    """
    header = read_header(data)
    notes, turned = [], notes_rotation(header)
    image = Image.fromarray(decode_part(header))
    if turned:
        notes.append("The photo notes a rotation (EXIF), which is not applied: it is shown as its file stores it.")
    if max(image.size) > MAX_SIDE:
        notes.append(f"Shrunk from {image.width} x {image.height} pixels; u2pl predict looks at all of them.")
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    photo = np.asarray(image)
    logits = model.logits(photo)
    mask = logits.argmax(0).cpu().numpy()
    shares = np.bincount(mask.ravel(), minlength=len(model.classes)) / mask.size
    return Seen(
        width=image.width,
        height=image.height,
        overlay=jpeg_uri(overlay(photo, mask, model.palette)),
        mask=png_uri(colour_mask(mask, model.palette)),
        entropy=jpeg_uri(heat(relative_entropy(logits).cpu().numpy())),
        photo=jpeg_uri(photo),
        classes=[
            Share(model.classes[each], model.palette[each], float(shares[each]))
            for each in np.argsort(-shares, kind="stable")
            if shares[each]
        ],
        notes=notes,
    )


def application(model: Model, title: str) -> web.Application:
    """The server: `/` is the page, `/look` takes the bytes of an image and gives a `Seen`, or an `error`, as JSON.

    Args:
        model: the network; it looks at one photo at a time.
        title: what the page calls it.
    """
    busy = threading.Lock()

    def looked(data: bytes) -> Seen:
        with busy:
            return look(model, data)

    async def page(request: web.Request) -> web.Response:
        del request
        shown = list(zip(model.classes, model.palette, strict=True))
        text = render("demo.html", title=title, classes=shown, max_bytes=MAX_BYTES)
        return web.Response(text=text, content_type="text/html")

    async def answer(request: web.Request) -> web.Response:
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _error(
                f"larger than {MAX_BYTES >> 20} MiB: take a smaller file", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            )
        try:
            return web.json_response(asdict(await asyncio.to_thread(looked, data)))
        except DecodeError as error:
            return _error(f"cannot be read: {error}", HTTPStatus.UNPROCESSABLE_ENTITY)

    made = web.Application(client_max_size=MAX_BYTES)
    made.add_routes([web.get("/", page), web.post("/look", answer)])
    return made


def _error(why: str, status: int) -> web.Response:
    return web.json_response({"error": why}, status=status)


def address(host: str, port: int) -> str:
    """Where the page is; in a URL the address of an IPv6 host stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: web.Application, host: str, port: int) -> None:
    """Serves until Ctrl-C; prints the address once it answers.

    Args:
        app: from `application`.
        host: name or address to listen at.
        port: 0: a free one.

    Raises:
        UserError: nothing can listen there.
        KeyboardInterrupt: Ctrl-C, after a line.
    """
    try:
        asyncio.run(_serve(app, host, port))
    except KeyboardInterrupt:
        print("\nthe page is closed", flush=True)
        raise


async def _serve(app: web.Application, host: str, port: int) -> None:
    runner: Any = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); --port 0 is free") from error
        print(f"{address(host, runner.addresses[0][1])} shows what the network sees; Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()

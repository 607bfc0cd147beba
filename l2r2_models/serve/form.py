"""Read the images and boxes of a request from its multipart form, in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from .limits import Limits, Refused

HOW = "send a multipart form with one or more files called image"
BOXES = "boxes must be a JSON list of [x0, y0, x1, y1], an object with boxes and scores, or null"
LINGER = 5  # seconds for which the rest of a refused upload is still read
BOX_BYTES = 2**20  # largest field of boxes


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        name: file name as sent.
        data: the encoded image.
        boxes: xyxy boxes in pixels of the upright image, or None.
        scores: their scores, or None.
    """

    name: str
    data: bytes
    boxes: list[list[float]] | None = None
    scores: list[float] | None = None


async def read_form(request: Request, limits: Limits) -> list[Upload]:
    """Read the images of a request and their boxes, in order.

    The form has the files `image`, and either no field `boxes` or one per image, in the same order.

    Raises:
        Refused: when the form is malformed, too large, or takes too long.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        await _discard(request)
        raise Refused(415, f"The request is not a form; {HOW}.")
    try:
        form = await asyncio.wait_for(_parse(request, limits), limits.seconds)
    except Refused:
        await _discard(request)
        raise
    except asyncio.TimeoutError:
        raise Refused(408, f"The upload took longer than {limits.seconds:g} seconds.") from None
    except ClientDisconnect:
        raise Refused(400, "The upload was cut off.") from None
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            raise Refused(422, f"More than {limits.images} images or fields of boxes; send fewer per request.") from None
        raise Refused(422, f"The form cannot be read ({error.message.rstrip('.')}); {HOW}.") from None
    if unknown := sorted({name for name, _ in form} - {"image", "boxes"}):
        raise Refused(422, f"Unknown field {json.dumps(unknown[0][:50])}; the fields are image and boxes.")
    images = [value for name, value in form if name == "image"]
    if not images or not all(isinstance(image, UploadFile) for image in images):
        raise Refused(422, f"The form has no image file; {HOW}.")
    boxes = [_boxes(value) for name, value in form if name == "boxes"]
    if boxes and len(boxes) != len(images):
        raise Refused(422, f"{len(boxes)} fields of boxes for {len(images)} images; send one per image, null for no boxes.")
    if (count := sum(len(found or ()) for found, _ in boxes)) > limits.boxes:
        raise Refused(422, f"{count:,} boxes, more than the limit of {limits.boxes:,} per request.")
    pairs = zip(images, boxes or [(None, None)] * len(images))
    return [Upload(image.filename or "image", await image.read(), *given) for image, given in pairs]


async def _parse(request: Request, limits: Limits) -> list[tuple[str, Any]]:
    most = limits.megabytes * 2**20
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(limits)

    async def counted() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise _too_large(limits)
            yield chunk

    parser = MultiPartParser(
        request.headers, counted(), max_files=limits.images, max_fields=limits.images, max_part_size=BOX_BYTES
    )
    parser.spool_max_size = most + 1  # nothing is written to disk
    return (await parser.parse()).multi_items()


async def _discard(request: Request) -> None:
    """Read the rest of the body for a while; many clients read the answer only once they have sent everything."""
    with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):  # the last of these if nothing is left
        await asyncio.wait_for(_read_all(request), LINGER)


async def _read_all(request: Request) -> None:
    async for _ in request.stream():
        pass


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"The request is larger than the limit of {limits.megabytes:,} MB; send fewer or smaller images.")


def _boxes(value: Any) -> tuple[list[list[float]] | None, list[float] | None]:
    """Parse one field of boxes and check that its parts are lists of numbers of matching lengths."""
    try:
        given = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise Refused(422, f"The boxes are not JSON; {BOXES}.") from None
    boxes, scores = (given.get("boxes"), given.get("scores")) if isinstance(given, dict) else (given, None)
    if boxes is None and given is None:
        return None, None
    if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) == 4 and _numbers(box) for box in boxes):
        raise Refused(422, f"The boxes have an unexpected form; {BOXES}.")
    if scores is not None and (not isinstance(scores, list) or len(scores) != len(boxes) or not _numbers(scores)):
        raise Refused(422, "The scores are not one number per box.")
    return boxes, scores


def _numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e9 for value in values)  # NaN fails too

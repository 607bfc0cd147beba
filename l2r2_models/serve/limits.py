"""The limits of the server, and the refusal of a request."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import L2R2Error


class Refused(Exception):
    """A request that is not answered with predictions.

    Attributes:
        status: HTTP status.
        sentence: what is wrong with the request.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may wait.

    Attributes:
        megabytes: size of a request.
        pixels: width * height of an image; a larger one is a failure of that image.
        images: images per request.
        boxes: boxes per request.
        queue: images that are uploaded or classified at the same time, over all requests.
        seconds: time that an upload may take.

    Raises:
        L2R2Error: when a limit is not positive, or the queue is shorter than one full request.
    """

    megabytes: int = 64
    pixels: int = 50_000_000
    images: int = 16
    boxes: int = 1000
    queue: int = 64
    seconds: float = 60

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) <= 0:
                raise L2R2Error(f"The limit {one.name} must be positive, got {getattr(self, one.name)}.")
        if self.queue < self.images:
            raise L2R2Error(f"A queue of {self.queue} images has no room for a request of {self.images}; use a longer queue.")

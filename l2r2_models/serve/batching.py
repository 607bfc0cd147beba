"""Decode uploads in a few threads and classify them in one model thread, in batches across connections."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import LazyImage
from ..predict.items import BATCH_PIXELS, Item, is_large
from ..predict.prediction import Prediction
from ..predict.predictor import Predictor
from .form import Upload
from .limits import Limits, Refused
from .metrics import Metrics

DECODERS = min(4, os.cpu_count() or 1)
WAIT = 0.005  # seconds that a batch waits for more images by default


class Place:
    """The place of one request in the queue, one image until more are known."""

    def __init__(self, queue: Batcher) -> None:
        self.queue, self.images = queue, 0
        self.grow(1)

    def grow(self, images: int) -> None:
        """Make the place `images` long.

        Raises:
            Refused: when the queue is full.
        """
        if self.queue.waiting + images - self.images > self.queue.limits.queue:
            raise Refused(429, f"The queue of {self.queue.limits.queue} images is full; try again later.")
        self.queue.waiting += images - self.images
        self.images = images


class Batcher:
    """Classify the uploads of concurrent requests in common batches.

    Args:
        predictor: makes the predictions; a batch has at most its `batch_size` images.
        limits: the limits of the server.
        wait: seconds that an incomplete batch waits for more images.
        metrics: counts images and batches.
    """

    def __init__(self, predictor: Predictor, limits: Limits, wait: float, metrics: Metrics) -> None:
        self.predictor, self.limits, self.wait, self.metrics = predictor, limits, wait, metrics
        self.waiting = 0
        self._held = 0  # pixels of the decoded images in memory
        self._decoding = asyncio.Semaphore(DECODERS)
        self._room = asyncio.Condition()
        self._ready: asyncio.Queue[tuple[Item, asyncio.Future[Prediction]]] = asyncio.Queue()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Classify while the context is open."""
        with ThreadPoolExecutor(DECODERS) as self._decoders, ThreadPoolExecutor(1) as self._model:
            work = asyncio.create_task(self._work())
            try:
                yield
            finally:
                work.cancel()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Take a place in the queue for one request.

        Raises:
            Refused: when the queue is full.
        """
        place = Place(self)
        try:
            yield place
        finally:
            self.waiting -= place.images

    async def predict(self, uploads: Sequence[Upload]) -> list[Prediction]:
        """Classify the uploads of one request; an image that cannot be used becomes a Prediction with `failure`."""
        predictions = list(await asyncio.gather(*map(self._predict, uploads)))
        for prediction in predictions:
            self.metrics.add("l2r2_images_total", outcome="predicted" if prediction.failure is None else "failed")
        return predictions

    async def _predict(self, upload: Upload) -> Prediction:
        loop = asyncio.get_running_loop()
        async with self._decoding:
            try:
                item = await loop.run_in_executor(self._decoders, self._item, upload)
            except L2R2Error as error:
                return Prediction(upload.name, (), str(error))
            async with self._room:  # the next image is decoded once this one has room
                await self._room.wait_for(lambda: self._held < BATCH_PIXELS)
                self._held += item.pixels
        answer: asyncio.Future[Prediction] = loop.create_future()
        self._ready.put_nowait((item, answer))
        return await answer

    def _item(self, upload: Upload) -> Item:
        fill, most = self.predictor.model.view_spec.fill, self.limits.pixels
        image = LazyImage(upload.data, fill=fill, max_pixels=most, name=upload.name)
        given = upload.boxes
        return self.predictor.load(image, None if given is None else Detections.from_lists(given, image.size, upload.scores))

    async def _work(self) -> None:
        loop, size = asyncio.get_running_loop(), self.predictor.batch_size
        while True:
            batch = [await self._ready.get()]
            if self._ready.qsize() + 1 < size:
                await asyncio.sleep(self.wait)
            items = [batch[0][0]]
            while len(items) < size and not is_large(items) and not self._ready.empty():
                batch.append(self._ready.get_nowait())
                items.append(batch[-1][0])
            start = time.perf_counter()
            try:
                found = await loop.run_in_executor(self._model, self._classify, items)
            except Exception as error:  # a bug fails these requests, not the server
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (_, answer), prediction in zip(batch, found):
                    answer.set_result(prediction)
            self.metrics.add("l2r2_batches_total")
            self.metrics.add("l2r2_batch_seconds_total", time.perf_counter() - start)
            async with self._room:
                self._held -= sum(item.pixels for item in items)
                self._room.notify_all()

    def _classify(self, items: Sequence[Item]) -> list[Prediction]:
        """Classify a batch; if that fails, e.g. because the memory of the GPU is full, each image is tried alone."""
        try:
            return list(self.predictor.predict_items(items))
        except (L2R2Error, RuntimeError) as error:
            if len(items) == 1:
                why = " ".join(str(error).split())[:300]
                return [Prediction(items[0].name, (), f"{items[0].name}: cannot be classified ({why}).")]
        return [prediction for item in items for prediction in self._classify([item])]

"""The HTTP interface: /predict, /health, /metrics, and a short description at /."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..predict.predict_files import header_of
from ..predict.predictor import Predictor
from .batching import WAIT, Batcher
from .form import read_form
from .limits import Limits, Refused
from .metrics import Metrics

FORM = {  # what /openapi.json says of the body of /predict
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "boxes": {"type": "array", "items": {"type": "string", "contentMediaType": "application/json"}},
                    },
                }
            }
        },
    }
}
HOW_TO = """{name}: {classes} classes, {branches}, fusion {fusion}

One image:
  curl -F image=@photo.jpg {url}predict
With boxes, [x0, y0, x1, y1] in pixels:
  curl -F image=@photo.jpg -F 'boxes=[[130, 42, 410, 380]]' {url}predict
Several images, with one field of boxes per image (null for none, scores are optional):
  curl -F image=@a.jpg -F image=@b.jpg -F boxes=null -F 'boxes={{"boxes": [[0, 0, 50, 60]], "scores": [0.9]}}' {url}predict

The answer is what `l2r2 predict` writes: the settings of the model, and per image its objects or a failure.
Limits per request: {limits.megabytes} MB, {limits.images} images of {limits.pixels:,} pixels, {limits.boxes:,} boxes.
{localizer}

{url}health        whether the server works
{url}metrics       counters for Prometheus
{url}openapi.json  description of the interface
"""


def create_app(predictor: Predictor, limits: Limits | None = None, wait: float = WAIT) -> FastAPI:
    """Create the application.

    Args:
        predictor: makes the predictions.
        limits: limits of a request and of the queue.
        wait: seconds that an incomplete batch waits for more images.

    >>> app = create_app(Predictor.from_pretrained("runs/fungi"))  # doctest: +SKIP
    """
    limits, metrics = limits or Limits(), Metrics()
    batcher = Batcher(predictor, limits, wait, metrics)
    header = header_of(predictor)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    # the pages of /docs would load scripts from another site
    app = FastAPI(title="l2r2 serve", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        status = 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            metrics.add("l2r2_requests_total", status=status)

    @app.exception_handler(Refused)
    async def refuse(_: Request, refused: Refused) -> Response:
        headers = {"Retry-After": "1"} if refused.status == 429 else None
        return JSONResponse({"error": refused.sentence}, refused.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def missing(request: Request, error: HTTPException) -> Response:
        unknown = error.status_code == 404
        sentence = "There is no such address; see /." if unknown else f"This address does not accept {request.method}; see /."
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "The server failed on this request; its log says why."}, 500)

    @app.post("/predict", summary="Classify images", openapi_extra=FORM)
    async def predict(request: Request) -> Response:
        with batcher.place() as place:
            uploads = await read_form(request, limits)
            place.grow(len(uploads))
            predictions = await batcher.predict(uploads)
        body = {**header, "images": [prediction.to_dict() for prediction in predictions]}
        return Response(json.dumps(body), media_type="application/json")

    @app.get("/health", summary="Whether the server works")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": header["model"], "waiting": batcher.waiting}

    @app.get("/metrics", summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(batcher.waiting), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", summary="How to use this server", response_class=PlainTextResponse)
    async def how_to(request: Request) -> str:
        return HOW_TO.format(
            name=header["model"],
            classes=len(predictor.labels),
            branches=" and ".join(predictor.model.branches),
            fusion=header["fusion"]["name"],
            url=request.base_url,
            limits=limits,
            localizer=_localizer(predictor),
        )

    return app


def _localizer(predictor: Predictor) -> str:
    if predictor.model.finds_object:
        return "The model finds the object itself; boxes are not used."
    if predictor.localizer is None:
        return "An image without boxes is classified as a whole."
    return f"In an image without boxes, the localizer {predictor.localizer.info['localizer']} finds the objects."

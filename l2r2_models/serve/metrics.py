"""Counters of the server in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter

HELP = {
    "l2r2_requests_total": "counter Requests by HTTP status.",
    "l2r2_images_total": "counter Images by outcome.",
    "l2r2_batches_total": "counter Batches that were classified.",
    "l2r2_batch_seconds_total": "counter Seconds spent on classifying batches.",
    "l2r2_waiting_images": "gauge Images that are uploaded, waiting, or being classified.",
}


class Metrics:
    """Counters by name and label, updated from the event loop only.

    >>> metrics = Metrics()
    >>> metrics.add("l2r2_images_total", 2, outcome="predicted")
    >>> print(metrics.text(waiting=0).splitlines()[2])
    l2r2_images_total{outcome="predicted"} 2
    """

    def __init__(self) -> None:
        self.values: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, amount: float = 1, **label: str | int) -> None:
        """Add to a counter with at most one label, whose values must not come from a request."""
        text = "".join(f'{{{key}="{value}"}}' for key, value in label.items())
        self.values[name, text] += amount  # type: ignore[assignment]

    def text(self, waiting: int) -> str:
        """Return all metrics; `waiting` is the number of images in the queue."""
        values = {**self.values, ("l2r2_waiting_images", ""): waiting}
        lines = []
        for name, about in HELP.items():
            kind, _, words = about.partition(" ")
            found = sorted((label, value) for (of, label), value in values.items() if of == name)
            if found:
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
                lines += [f"{name}{label} {value:.12g}" for label, value in found]
        return "\n".join(lines) + "\n"

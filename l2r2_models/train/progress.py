"""What a training prints: one line per epoch, and on a terminal a bar over the steps of the epoch."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..views import BRANCHES

OUTPUTS = (*BRANCHES, "fused")


class EpochLines(TrainerCallback):
    """Prints loss, validation accuracy of each branch, speed and time left after each epoch, to stderr.

    Args:
        images: training images per epoch.
        steps: optimizer steps per epoch.

    >>> print(EpochLines(images=100, steps=10).line(1, 4, seconds=20.0, done=1))
    epoch 1/4  5.0 images/s  1:00 left
    """

    def __init__(self, images: int, steps: int) -> None:
        self.images, self.steps = images, steps
        self.found: dict[str, float] = {}
        self.began, self.first = 0.0, 0
        self.bar: Any = None

    def line(self, epoch: int, epochs: int, seconds: float, done: int) -> str:
        """The line after an epoch.

        Args:
            epoch, epochs: number of the epoch, and of all.
            seconds: time since the training began or continued.
            done: epochs trained in that time.
        """
        parts = [f"epoch {epoch}/{epochs}"]
        if "loss" in self.found:
            parts.append(f"loss {self.found['loss']:.3f}")
        accuracy = [f"{n} {100 * self.found[k]:.1f} %" for n in OUTPUTS if (k := f"eval_{n}_accuracy") in self.found]
        parts += [", ".join(accuracy)] if accuracy else []
        minutes, rest = divmod(round(seconds / done * (epochs - epoch)), 60)
        parts += [f"{self.images * done / seconds:.1f} images/s", f"{minutes}:{rest:02d} left"]
        return "  ".join(parts)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock, and the bar where there is a terminal."""
        self.began, self.first = time.monotonic(), state.global_step // self.steps
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.steps, desc=f"epoch {self.first + 1}", leave=False, unit="step", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what the line shows."""
        self.found |= logs or {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the line: the Trainer saves last, after it has logged the loss and evaluated."""
        if not state.is_world_process_zero:
            return
        epoch, epochs = state.global_step // self.steps, state.max_steps // self.steps
        text = self.line(epoch, epochs, time.monotonic() - self.began, max(1, epoch - self.first))
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
            return
        self.bar.write(text, file=sys.stderr)
        self.bar.reset()
        self.bar.set_description(f"epoch {epoch + 1}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

"""A profile of a prediction with torch's profiler, see `l2r2 benchmark --profile`."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from ..io import write_atomic
from .benchmark import time_stages
from .inputs import Inputs
from .predictor import Predictor

ROWS = 15  # of the table


def profile_stages(predictor: Predictor, inputs: Inputs, file: Path) -> str:
    """Profile the stages of a prediction, one after another in one thread.

    Args:
        predictor: a predictor without a localizer.
        inputs: image files and their boxes.
        file: file for the trace, in the format of Chrome's and Perfetto's viewers; stages are ranges called `l2r2: STAGE`.

    Returns:
        A table of the operators that take the most time of their own.

    Raises:
        L2R2Error: when no image can be read, or the file cannot be written.
    """
    cuda = predictor.device.type == "cuda"
    time_stages(predictor, inputs.evenly(predictor.network.most))  # warm-up
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        time_stages(predictor, inputs)
    write_atomic(file, lambda path: found.export_chrome_trace(str(path)))
    sort_by = "self_device_time_total" if cuda else "self_cpu_time_total"
    table: str = found.key_averages().table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=40)
    return table

"""Compare every kernel with its peers on one GPU: `python benchmarks/speed/kernels.py`.

Every result is compared with float64 before it is timed, and a wrong result of our kernels ends the run with exit code 1. The
copy and matmul rates that the percentages refer to are measured in the same run. The table is printed, and written to
benchmarks/results/ as CSV, with the GPU, the versions and the date, and as a plot of ratios against goals.
"""

import datetime
import importlib.util
import platform
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from report import OURS, show, write_csv, write_plot
from timing import timed

RESULTS = Path(__file__).resolve().parents[1] / "results"


def seconds(call) -> float:
    """Median time of a call on the GPU."""
    return statistics.median(timed([call], torch.device("cuda"), 20)) / 1e3


def copy_rate() -> float:
    """Bytes per second of a device copy, reads plus writes, of a buffer larger than the cache."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def versions() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "torchvision", "kornia"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    return {**found, "python": platform.python_version(), "date": datetime.date.today().isoformat()}


def main() -> int:
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was measured or written.")
        return 1
    import masked_attention_bench
    import roi_views_bench

    about = versions()
    rates = {"copy_bytes_per_s": copy_rate(), "matmul_flops_per_s": matmul_rate()}
    table: list[dict] = []
    for bench in (roi_views_bench, masked_attention_bench):
        table += bench.rows("cuda", **rates)
    return report(table, about, rates)


def report(table: list[dict], about: dict[str, str], rates: dict[str, float]) -> int:
    """Print and write the table, unless a result of our kernels is wrong."""
    wrong = [f"{row['op']}, {row['case']}" for row in table if row["provider"] == OURS and not row["correct"]]
    if wrong:
        print("Wrong results, so nothing was timed: " + "; ".join(wrong))
        return 1
    versions_line = ", ".join(f"{k} {v}" for k, v in about.items())
    rates_line = f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    print(versions_line, rates_line, *map(show, table), sep="\n")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"kernels_{about['gpu'].lower().replace(' ', '-')}_{about['date']}.csv"
    write_csv(path, table, {**about, **rates})
    write_plot(path.with_suffix(".png"), table, f"{versions_line}\n{rates_line}")
    print(f"Wrote {path} and {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

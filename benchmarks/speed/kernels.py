"""Every kernel against its peers on one GPU, in one run: `python benchmarks/speed/kernels.py`.

Correctness comes first: nothing is timed that was not compared with float64, and a wrong result of ours ends the run with
exit code 1. The copy and matmul rates that the percentages refer to are measured in the same run. The table is printed, and
written as CSV with the GPU, the versions and the date to benchmarks/results/.
"""

import csv
import datetime
import importlib.util
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
RESULTS = Path(__file__).resolve().parents[1] / "results"
FIELDS = [
    "op", "case", "provider", "ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul", "ratio", "must",
    "stretch", "correct",
]  # fmt: skip


def seconds(call, repeats: int = 20) -> float:
    """Median time of a call on the GPU."""
    for _ in range(3):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[repeats // 2] / 1e3


def copy_rate() -> float:
    """Bytes a second of a device copy, read and write counted, of a buffer that no cache holds."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """FLOP a second of a large bfloat16 matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def versions() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "torchvision", "kornia"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    return {**found, "python": platform.python_version(), "date": datetime.date.today().isoformat()}


def show(row: dict) -> str:
    ms = (
        "not timed"
        if row["ms_median"] is None
        else f"{row['ms_median']:9.3f} ms ({row['ms_p20'] or 0:.3f}-{row['ms_p80'] or 0:.3f})"
    )
    ratio = "" if row["ratio"] is None else f"{row['ratio']:7.2f}x"
    goal = (
        "" if row["must"] is None else f"must {row['must']:.2f}x" + (f", stretch {row['stretch']:.2f}x" if row["stretch"] else "")
    )
    copy = "" if row["pct_copy"] is None else f"{row['pct_copy']:5.1f} % copy"
    return f"{row['op']:18} {row['case']:44} {row['provider']:26} {ms:34} {copy:12} {ratio:9} {goal}"


def write(table: list[dict], about: dict[str, str], rates: dict[str, float]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    gpu = about["gpu"].lower().replace(" ", "-")
    path = RESULTS / f"kernels_{gpu}_{about['date']}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *about, *rates])
        writer.writeheader()
        writer.writerows({**row, **about, **rates} for row in table)
    return path


def main() -> int:
    if not torch.cuda.is_available():
        print("No CUDA device: the GPU rows of the kernels' goal tables are unmeasured here, and nothing was written.")
        return 1
    import masked_attention_bench
    import roi_views_bench

    about = versions()
    rates = {"copy_bytes_per_s": copy_rate(), "matmul_flops_per_s": matmul_rate()}
    table: list[dict] = []
    for bench in (roi_views_bench, masked_attention_bench):
        table += bench.rows("cuda", **rates)
    wrong = [f"{row['op']}, {row['case']}" for row in table if row["provider"] == "l2r2" and not row["correct"]]
    if wrong:
        print("Wrong results, so no speeds: " + "; ".join(wrong))
        return 1
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s")
    for row in table:
        print(show(row))
    print(f"Wrote {write(table, about, rates)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

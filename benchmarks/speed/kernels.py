"""Compare every kernel, and training steps of `finetune`, with their peers on one GPU: `python benchmarks/speed/kernels.py`.

`--dry-run` needs no GPU: it runs the same code on a CPU with tiny inputs, prints the table, and keeps no files. Its times mean
nothing. `gpu.py` runs the tests, this script and the other benchmarks.

Every result is compared with a reference before it is timed. A row that fails or is wrong is not timed, its note says why, the
others go on, and the exit code is 1 if it is one of ours. The copy and matmul rates that the percentages refer to are measured in
the same run. The tables are printed, and written to benchmarks/results/ as CSV, with the GPU, the versions and the date, and as a
plot of ratios against goals.
"""

import argparse
import datetime
import importlib.util
import platform
import statistics
import sys
import tempfile
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from report import OURS, OWN, show, summary, write_csv, write_plot
from timing import timed

RESULTS = Path(__file__).resolve().parents[1] / "results"


def seconds(call, device: torch.device) -> float:
    """Median time of a call."""
    return statistics.median(timed([call], device, 20)) / 1e3


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second of a copy on the device, reads plus writes; on a GPU the buffer must be larger than its cache."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, n: int) -> float:
    """FLOP/s of a bfloat16 matrix product of n x n."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "dry run on a CPU"
    found = {"gpu": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "torchvision", "kornia"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    return {**found, "python": platform.python_version(), "date": datetime.date.today().isoformat()}


def failed(bench: str) -> dict:
    """A row that says that the rest of a benchmark could not be run."""
    about = {"op": bench, "case": "rows after this", "provider": OURS, "correct": False, "note": "failed, see the traceback"}
    return {**dict.fromkeys(OWN), **about}


def measure(device: torch.device, tiny: bool) -> tuple[list[dict], dict[str, str], dict[str, float]]:
    """All rows, the versions, and the rates that the percentages refer to."""
    import finetune_bench
    import masked_attention_bench
    import roi_views_bench

    buffer, n = (1 << 20, 128) if tiny else (1 << 30, 8192)
    rates = {"copy_bytes_per_s": copy_rate(device, buffer), "matmul_flops_per_s": matmul_rate(device, n)}
    table: list[dict] = []
    for bench in (roi_views_bench, masked_attention_bench, finetune_bench):
        try:
            for row in bench.rows(device.type, **rates, sizes=bench.TINY if tiny else None):
                table.append(row)
        except Exception:  # while the inputs of a row are made: the other benchmarks go on
            traceback.print_exc()
            table.append(failed(bench.__name__))
    return table, versions(device), rates


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs on a CPU; no files are kept")
    if parser.parse_args(arguments).dry_run:
        with tempfile.TemporaryDirectory() as folder:
            code = report(*measure(torch.device("cpu"), True), Path(folder))
        if code == 0:
            print("Dry run: the files were deleted, and the times mean nothing.")
        return code
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was measured or written. Try the script with --dry-run.")
        return 1
    return report(*measure(torch.device("cuda"), False), RESULTS)


def report(table: list[dict], about: dict[str, str], rates: dict[str, float], folder: Path) -> int:
    """Print and write the table; return 1 if a row of ours is wrong or failed."""
    wrong = [f"{row['op']}, {row['case']}" for row in table if row["provider"] == OURS and not row["correct"]]
    versions_line = ", ".join(f"{k} {v}" for k, v in about.items())
    rates_line = f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matmul {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    print(versions_line, rates_line, *map(show, table), "", *summary(table), sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels_{about['gpu'].lower().replace(' ', '-')}_{about['date']}.csv"
    write_csv(path, table, {**about, **rates})
    write_plot(path.with_suffix(".png"), table, f"{versions_line}\n{rates_line}")
    print(f"Wrote {path} and {path.with_suffix('.png').name}")
    if wrong:
        print("Wrong or failed, so not timed: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

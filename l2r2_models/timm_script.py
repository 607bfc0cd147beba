"""Run a script of timm's, unchanged, on our models: `python -m l2r2_models.timm_script validate.py data/ --model l2r2_resnet50`.

timm has no plug-ins: its scripts know our models once `l2r2_models` is imported, which is all that happens before SCRIPT runs as
the main program with the rest of the command line. Boxes never reach these scripts: they see the whole-image head.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import l2r2_models  # noqa: F401  (registers the models)


def main(arguments: list[str]) -> None:
    """Run `arguments[0]` with `arguments[1:]`, as `python SCRIPT ...` does: its folder comes first on the import path."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m l2r2_models.timm_script SCRIPT [ARGUMENTS]", file=sys.stderr)
        sys.exit(2)
    script = Path(arguments[0])
    if not script.is_file():
        print(f"error: {script}: no such script.", file=sys.stderr)
        sys.exit(1)
    sys.argv[:] = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

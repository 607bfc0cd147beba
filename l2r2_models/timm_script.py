"""Run an unmodified timm script on our models: `python -m l2r2_models.timm_script validate.py data/ --model l2r2_resnet50`.

timm has no plug-in mechanism: its scripts find our models once `l2r2_models` has been imported, so this module imports it and
then runs SCRIPT as the main program with the remaining arguments. timm's scripts pass no boxes, so they evaluate the full branch.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import l2r2_models  # noqa: F401  (registers the models)


def main(arguments: list[str]) -> None:
    """Run `arguments[0]` with `arguments[1:]` as `python SCRIPT ...` would, with its folder first on the import path.

    Raises:
        SystemExit: when the script is not given (status 2) or does not exist (status 1).
    """
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m l2r2_models.timm_script SCRIPT [ARGUMENTS]", file=sys.stderr)
        sys.exit(2)
    script = Path(arguments[0])
    if not script.is_file():
        print(f"error: {script}: no such script; pass the path of a timm script.", file=sys.stderr)
        sys.exit(1)
    sys.argv[:] = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

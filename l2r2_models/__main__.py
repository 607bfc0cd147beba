"""`python -m l2r2_models` runs the command `l2r2`, e.g. under torchrun."""

from l2r2_cli import main

main()

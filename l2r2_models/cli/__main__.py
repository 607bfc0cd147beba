"""`python -m l2r2_models.cli`, which torchrun can start."""

from l2r2_cli import main

main()

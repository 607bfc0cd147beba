"""`python -m l2r2_models.cli`, which torchrun can start."""

from . import main

main()

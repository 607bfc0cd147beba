"""`python -m l2r2_models`: the command `l2r2`, which torchrun can start this way."""

from l2r2_cli import main

main()

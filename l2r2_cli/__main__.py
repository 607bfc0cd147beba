"""`python -m l2r2_cli`: the command `l2r2`."""

from . import main

main()

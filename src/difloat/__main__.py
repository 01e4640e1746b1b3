"""`python -m difloat`: the command line, also under `accelerate launch -m difloat`."""

from difloat.cli import main

main()

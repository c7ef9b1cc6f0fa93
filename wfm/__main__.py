"""`python -m wfm` is the command `wfm`."""

from wfm.cli import main

main()

"""`python -m sidecar` is `spanlock`."""

from sidecar.cli.main import main

main()

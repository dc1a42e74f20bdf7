"""`python -m service.cli`: the `amd` command without its script."""

from service.cli.main import main

main()

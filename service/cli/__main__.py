"""`python -m service.cli`: run the `amd` command without the installed script."""

from service.cli.main import main

main()

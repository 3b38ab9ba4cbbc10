"""`python -m npad`."""

from npad.cli.commands import main

main()

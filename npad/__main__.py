"""`python -m npad`."""

from npad.cli import main

main()

"""`python -m ragate`."""

from ragate.cli import main

main()

"""``python -m fnet_search``: the command line."""

from fnet_search.cli.main import main

main()

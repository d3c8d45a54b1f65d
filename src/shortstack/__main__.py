"""`python -m shortstack` and the `shortstack` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns."""
    from shortstack.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

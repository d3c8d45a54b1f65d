"""`python -m shortstack` and the `shortstack` command."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; never returns."""
    if sys.platform == "win32":
        from shortstack.errors import NO_WINDOWS

        sys.exit("error: {}\nhint: {}".format(*NO_WINDOWS))
    from shortstack.cli import quick_start
    from shortstack.cli.app import run
    from shortstack.runtime import libraries

    libraries.importing = quick_start.importing
    code = run(sys.argv[1:])
    gc.freeze()  # the process ends: to look once more through all that was imported takes a second
    sys.exit(code)


if __name__ == "__main__":
    main()

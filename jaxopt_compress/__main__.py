"""The command ``jaxopt-compress``, also ``python -m jaxopt_compress``."""

import sys
from collections.abc import Sequence

from jaxopt_compress.extras import require


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error whose message says how to mend it.
    """
    try:
        for package in ("tyro", "rich"):
            require(package, extra="cli")
        # The commands are declared with tyro, so they are imported once it is known to be there.
        from jaxopt_compress.cli import app

        app.cli(prog="jaxopt-compress", args=argv)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

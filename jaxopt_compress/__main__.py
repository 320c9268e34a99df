"""The command ``jaxopt-compress``, also ``python -m jaxopt_compress``."""

import importlib.metadata
import sys
from collections.abc import Sequence

from jaxopt_compress.extras import require

DESCRIPTION = (
    "Compresses and inspects checkpoints; --version prints the version. What a recipe may hold is "
    "in docs/recipes.md."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; those of the process by default.

    Returns:
        The exit code: 0, 2 after an error whose message says how to mend it, or 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        print(f"jaxopt-compress {importlib.metadata.version('jaxopt-compress')}")
        return 0
    try:
        for package in ("tyro", "rich"):
            require(package, extra="cli")
        # The commands are declared with tyro, so they are imported once it is known to be there.
        from jaxopt_compress.cli import app

        app.cli(prog="jaxopt-compress", description=DESCRIPTION, args=argv)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _message(error: Exception) -> str:
    """What an error says, without the number that an operating system gives it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

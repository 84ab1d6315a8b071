"""`spanlock`, and `python -m sidecar`. Agents install the library alone, which has no command: that is said in one line."""

import importlib
import sys


def main() -> None:
    """The console script."""
    try:
        command = importlib.import_module("sidecar.cli.main")
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        sys.exit("spanlock: this is the library alone; the command comes with, in a checkout: pip install '.[sidecar]'")
    command.main()


if __name__ == "__main__":
    main()

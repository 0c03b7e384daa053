"""The command lines of scripts that take names only."""

from __future__ import annotations

import argparse


def arguments(document: str | None, *names: str) -> list[str]:
    """What was given of `names`, those in brackets may be left out; --help prints the script's docstring."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in names:
        parser.add_argument(name.strip("[]"), nargs="?" if name.startswith("[") else None)
    return [value for value in vars(parser.parse_args()).values() if value is not None]

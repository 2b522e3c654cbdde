"""``python -m optimkit``: look at what there is. Later commands add a subparser here."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from optimkit import __version__, catalog
from optimkit.protocols import Method


def summary(record: Method) -> str:
    """A record's one line, marked where a primary source could not be read in full."""
    return record.summary + (" (provisional)" if record.status == "provisional" else "")


def list_methods(args: argparse.Namespace) -> int:
    """Prints one line a method."""
    rows = [
        (name, record.kind, f"{record.state_bytes:g}", record.communication, summary(record))
        for name, record in catalog.records(args.kind).items()
    ]
    header = ("name", "kind", "B/param", "traffic", "what it does")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(4)]
    for row in (header, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)]
        print("  ".join(cells).rstrip())
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints one method: its signature, its documentation and what its record says."""
    record = catalog.find(args.name)
    print(f"{record.name}{inspect.signature(record.factory)}\n")
    print(inspect.getdoc(record.factory))
    facts = {
        "kind": record.kind,
        "status": record.status,
        "state": f"{record.state_bytes:g} bytes a float32 parameter",
        "traffic": record.communication,
        "traced": ", ".join(record.traced) or "-",
        "static": ", ".join(record.static) or "-",
        "paper": record.paper or "-",
        "reference": record.reference or "-",
        "licence of the reference": record.licence or "none found",
        **{f"exempt from {rule}": reason for rule, reason in record.exempt.items()},
    }
    print()
    for fact, value in facts.items():
        print(f"{fact:>26}: {value}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m optimkit", description=__doc__)
    parser.add_argument("--version", action="version", version=f"optimkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="one line a method")
    kinds = ("recipe", "piece", "wrapper", "schedule", "combiner")
    listing.add_argument("--kind", choices=kinds, help="only this kind")
    listing.set_defaults(run=list_methods)

    one = commands.add_parser("show", help="signature, documentation and record of one method")
    one.add_argument("name")
    one.set_defaults(run=show)

    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except KeyError as error:
        print(f"optimkit: {error.args[0]}", file=sys.stderr)
        return 2

"""`tpo doctor`: find problems of this machine and environment, and say how to fix them."""

import typer

from tpo.cli import options
from tpo.cli.ui.output import FAILED, console, print_json

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(as_json: options.AsJson = False) -> None:
    """Check Python, packages, device, models, database, broker and ports. Exit 1 if a check fails."""
    from tpo.cli.checks import examine

    findings = examine()
    for finding in findings:
        if as_json:
            continue
        console().print(f"[{_STYLES[finding.verdict]}]{finding.verdict:4}[/] {finding.what:9}", end=" ")
        console().print(finding.message, markup=False)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(FAILED)

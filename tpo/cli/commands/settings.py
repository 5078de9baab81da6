"""`tpo settings`: list all settings, for people, for programs, and as the page in the documentation."""

import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer

from tpo.cli.options import AsJson
from tpo.cli.ui.output import USAGE, Failure, console, print_json

_PAGE = """# Settings

Every process reads its settings once, when it starts, from environment variables. `tpo doctor` finds mistakes in them.
This page is the output of `tpo settings --markdown`; `tpo settings` lists the same in a terminal.
"""


class _Setting(NamedTuple):
    name: str
    group: str
    default: Any
    description: str


def settings(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a page for the documentation.")] = False,
    as_json: AsJson = False,
) -> None:
    """List all settings by concern, with their defaults. Each is an environment variable of the server's processes."""
    if as_markdown and as_json:
        raise Failure("give either --markdown or --json", USAGE)
    found = list(_settings())
    if as_json:
        print_json([setting._asdict() for setting in found])
    elif as_markdown:
        print(_markdown(found), end="")
    else:
        _print(found)


def _settings() -> Iterator[_Setting]:
    from pydantic import SecretStr

    from tpo.settings import Settings

    for group in Settings.groups():
        for name, field in group.model_fields.items():
            default = field.default
            if isinstance(default, SecretStr):
                default = default.get_secret_value()
            elif isinstance(default, frozenset):
                default = ",".join(map(str, sorted(default)))
            title = (group.__doc__ or "").rstrip(".")
            yield _Setting(f"TPO_{name.upper()}", title, default, field.description or "")


def _shown(default: Any) -> str:
    """Return a default as it is written in the environment."""
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _by_group(found: list[_Setting]) -> Iterator[tuple[str, Iterator[_Setting]]]:
    return itertools.groupby(found, key=lambda setting: setting.group)


def _markdown(found: list[_Setting]) -> str:
    parts = [_PAGE]
    for title, settings_of_group in _by_group(found):
        parts.append(f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|\n")
        for setting in settings_of_group:
            default = "not set" if setting.default is None else f"`{_shown(setting.default)}`"
            # In the documentation, the names of its pages are links.
            meaning = re.sub(r"\(docs/(\w+)\.md\)", r"(see [\1](\1.md))", setting.description)
            parts.append(f"| `{setting.name}` | {default} | {meaning} |\n")
    return "".join(parts)


def _print(found: list[_Setting]) -> None:
    from rich.text import Text

    for title, settings_of_group in _by_group(found):
        console().print(Text(title, style="bold"))
        for setting in settings_of_group:
            console().print(Text(f"  {setting.name}={_shown(setting.default)}", style="cyan"))
            indent = " " * 6
            width = max(40, console().width)
            console().print(
                textwrap.fill(setting.description, width, initial_indent=indent, subsequent_indent=indent), markup=False
            )
        console().print()

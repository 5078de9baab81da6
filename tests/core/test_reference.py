"""The reference that is generated: the page on settings, and the pages of the command line and the HTTP API."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.app import create_app
from scripts.reference import http_page
from tpo.cli import app
from tpo.settings import Settings

ROOT = Path(__file__).parents[2]


def run(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_settings_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == run("settings", "--markdown"), "run: tpo settings --markdown > docs/settings.md"


def test_settings_are_all_in_one_group() -> None:
    grouped = [name for group in Settings.groups() for name in group.model_fields]
    assert sorted(grouped) == sorted(Settings.model_fields)
    listed = json.loads(run("settings", "--json"))
    assert [setting["name"] for setting in listed] == [f"TPO_{name.upper()}" for name in grouped]
    titles = list(dict.fromkeys(setting["group"] for setting in listed))
    assert titles == [(group.__doc__ or "").rstrip(".") for group in Settings.groups()]
    assert all(titles)


UNITS = {"_seconds": "seconds", "_hours": "hours", "_days": "days", "_gib": "GiB", "_bytes": "bytes"}
UNITS |= {"_tokens": "tokens", "_characters": "characters", "_latency": "seconds"}


def test_settings_are_described_by_sentences_with_units() -> None:
    for name, field in Settings.model_fields.items():
        text = field.description or ""
        assert text.endswith("."), name
        assert text[0].isupper() or text.startswith(("torch ", "vllm-pooling:", "sglang:")), name
        for ending, unit in UNITS.items():
            if name.endswith(ending):
                assert re.search(rf"\b{unit}\b", text), name


def test_settings_in_a_terminal_lists_every_setting() -> None:
    printed = run("settings")
    assert re.findall(r"^ +(TPO_\w+)=", printed, re.MULTILINE) == [
        f"TPO_{name.upper()}" for group in Settings.groups() for name in group.model_fields
    ]
    assert not [line for line in printed.splitlines() if line != line.rstrip()]


def test_settings_refuses_two_formats() -> None:
    result = CliRunner().invoke(app, ["settings", "--json", "--markdown"])
    assert (result.exit_code, "either --markdown or --json" in result.output) == (2, True)


@pytest.fixture(scope="module")
def page() -> str:
    return http_page()


def test_http_page_has_every_operation_and_object(page: str) -> None:
    document = create_app(Settings()).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"### {operation['summary']} {{ #{operation['operationId'].replace('_', '-')} }}" in page
            assert f"\n{method.upper()} {path}\n" in page
    for name, schema in document["components"]["schemas"].items():
        _, found, section = page.partition(f"\n### {name}\n")
        assert found, name
        section = section.partition("\n### ")[0]
        for field in schema.get("properties", {}):
            assert f"\n| `{field}`" in section, f"{name}.{field}"


def test_http_page_links_to_its_objects(page: str) -> None:
    anchors = {title.lower() for title in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert linked
    assert linked <= anchors


def test_http_page_has_well_formed_tables(page: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table

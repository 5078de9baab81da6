"""The documents say what the code does."""

import re
from pathlib import Path

import pytest

from tpo.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    documented = set(re.findall(r"^\| `(TPO_[A-Z_]+)`", text, re.MULTILINE))
    assert documented == {f"TPO_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_linked_files_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_every_guarantee_names_tests_that_exist() -> None:
    table, _, _ = (ROOT / "docs" / "guarantees.md").read_text().partition("\n## ")
    rows = re.findall(r"^\| \*\*.*", table, re.MULTILINE)
    assert rows
    for row in rows:
        named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^ *def {test}\(", source, re.MULTILINE), f"{file} has no {test}"

"""Every installation is pinned, checked by hashes, and complete for all Pythons that the project declares."""

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.requirements import (
    FILES,
    FOLDER,
    ROOT,
    Environment,
    declared,
    lines,
    missing_from,
    pins,
    required_by,
)

PYTHONS = ("3.11.2", "3.11.13", "3.12.11", "3.13.7")
"""Debian 12 has the first; before 3.11.3, redis needs a package more."""
OWN = {"tpo", "api", "worker", "migrations", "demo", "bench", "testing", "examples", "scripts", "tests"}
CHOSEN_BY_TORCH = re.compile(r"torch|nvidia-.*|cuda-.*|(pytorch-)?triton")
"""torch, and packages that only some builds of it need, in versions of their own."""
FOR_DEVELOPERS = {"demo/report.py"}
"""Modules in the wheel that users never run: this one draws the picture of `make evaluate`."""


def environment(python: str) -> Environment:
    return {"python_version": python.rpartition(".")[0], "python_full_version": python}


def pinned_for(*files: str) -> set[str]:
    return {name for file in files for name in pins(file)}


def test_requirements_are_those_that_lock_writes() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(FILES)
    commands = (ROOT / "scripts" / "lock").read_text()
    assert set(re.findall(r"^ *lock (\w+)", commands, re.MULTILINE)) == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_is_pinned_and_hashed(file: str) -> None:
    assert pins(file)
    for name, pin in pins(file).items():
        assert pin.version, name
        assert pin.hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in pin.hashes), name


@pytest.mark.parametrize("file", FILES)
def test_requirements_name_no_index(file: str) -> None:
    assert "://" not in (FOLDER / f"{file}.txt").read_text()
    assert not [line for line in lines(file) if line.startswith("-") or Requirement(line.split("--hash")[0]).url]


@pytest.mark.parametrize("file", FILES)
def test_only_the_build_of_torch_chooses_its_packages(file: str) -> None:
    chosen = {name for name in pins(file) if CHOSEN_BY_TORCH.fullmatch(name)}
    assert chosen == ({"triton"} if file == "triton" else set())


@pytest.mark.parametrize(
    ("part", "whole"), [("runtime", "local"), ("local", "dev"), ("torch", "dev"), ("build", "dev")]
)
def test_requirements_agree(part: str, whole: str) -> None:
    larger = pins(whole)
    assert {name: pin.version for name, pin in pins(part).items()}.items() <= {
        name: pin.version for name, pin in larger.items()
    }.items()


@pytest.mark.parametrize("python", PYTHONS)
def test_requirements_are_complete(python: str) -> None:
    where = environment(python)
    wanted = {
        "runtime": declared(project=True),
        "local": declared(project=True, extra="local"),
        "dev": declared("dev", project=True, extra="local"),
        "build": declared("build"),
        "mutants": declared("mutants"),
        "torch": declared("torch"),
        "triton": declared("triton"),
        "docs": declared("docs"),
    }
    for file, requirements in wanted.items():
        without_torch = [each for each in requirements if each.name != "torch"]
        assert not missing_from(file, without_torch, where), file


def test_mutation_tool_has_its_own_environment() -> None:
    assert "mutmut" in pins("mutants")
    assert [file for file in FILES if "mutmut" in pins(file)] == ["mutants"]
    shared = pins("dev").keys() & pins("mutants").keys()
    assert {name: pins("dev")[name].version for name in shared} == {n: pins("mutants")[n].version for n in shared}


def test_requirements_of_python_3_11_2_hold_async_timeout() -> None:
    pin = pins("runtime")["async-timeout"]
    assert [python for python in PYTHONS if pin.applies_to(environment(python))] == ["3.11.2"]


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_finds_what_it_requires(python: str) -> None:
    where = environment(python)
    required = [each for each in required_by("torch", "", where) if not CHOSEN_BY_TORCH.fullmatch(each.name)]
    assert required
    assert not missing_from("torch", required, where)


# What the code imports


@cache
def imports(file: Path) -> frozenset[str]:
    """Return the packages of others that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return frozenset(found - OWN - sys.stdlib_module_names)


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def not_installed_by(files: list[Path], *requirements: str) -> dict[str, set[str]]:
    """Return imports of packages that these requirements do not install, by file."""
    distributions = packages_distributions()
    installed = pinned_for(*requirements)
    found = {}
    for file in files:
        missing = {
            name
            for name in imports(file)
            if not installed & {canonicalize_name(each) for each in distributions.get(name, [name])}
        }
        if missing:
            found[str(file.relative_to(ROOT))] = missing
    return found


def test_imports_without_models_are_runtime_requirements() -> None:
    files = [path for path in modules("tpo", "api", "worker", "migrations") if "backends" not in path.parts]
    # `tpo doctor` looks whether they are there before it imports them.
    assert not_installed_by(files, "runtime") == {"tpo/cli/checks.py": {"torch", "huggingface_hub"}}


def test_imports_of_users_are_local_requirements() -> None:
    found = not_installed_by(modules("tpo", "api", "worker", "migrations", "demo"), "local")
    assert {file: names for file, names in found.items() if names - {"torch", "triton"}} == {
        file: {"matplotlib"} for file in FOR_DEVELOPERS
    }


def test_imports_of_developers_are_pinned() -> None:
    found = not_installed_by(modules(*OWN), "dev")
    # MkDocs is in the environment of the documentation site, which runs these hooks.
    assert found.pop("scripts/mkdocs_hooks.py") == {"mkdocs"}
    assert "mkdocs" in pins("docs")
    assert set().union(*found.values()) == {"torch", "triton"}

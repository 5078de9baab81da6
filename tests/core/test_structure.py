"""The structure of the code: import contracts apply to every folder, and no class has too many methods."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from tpo.db import Queries
from tpo.store import Store

ROOT = Path(__file__).parents[2]
PACKAGES = ("tpo", "api", "worker", "migrations", "demo", "bench", "testing", "examples", "scripts", "tests")


PLANTED = {
    "tests/core/planted.py": "bench.store",
    "testing/planted.py": "tests.core",
    "bench/planted.py": "tests.support.stack",
    "demo/planted.py": "api.app",
    "examples/planted.py": "tpo.store",
    "scripts/planted.py": "testing.ports",
    "migrations/planted.py": "worker.logs",
    "tpo/core/planted.py": "tpo.settings",
    "tpo/backends/remote/planted.py": "tpo.backends.local.engine",
    "tpo/webhooks/planted.py": "tpo.jobs.tables",
}


@pytest.mark.processes
def test_import_contracts_find_forbidden_imports(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "models", "data")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for module, imported in PLANTED.items():
        (tmp_path / module).write_text(f"import {imported}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 1, checked.stdout
    found = {
        module: f"{module.removesuffix('.py').replace('/', '.')} -> {imported}" in checked.stdout
        for module, imported in PLANTED.items()
    }
    assert all(found.values()), [module for module, is_found in found.items() if not is_found]


def test_classes_have_at_most_25_public_methods() -> None:
    counts: dict[str, int] = {}
    for package in ("tpo", "api", "worker", "demo", "bench", "testing", "examples", "scripts"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                    counts[f"{file}:{node.name}"] = sum(not method.name.startswith("_") for method in methods)
    assert max(counts.values()) <= 25, {name: count for name, count in counts.items() if count > 25}
    parts = [part for part in vars(Store(create_engine("sqlite://"))).values() if isinstance(part, Queries)]
    assert len(parts) > 10
    for part in parts:  # including inherited methods
        public = [name for name in dir(part) if not name.startswith("_") and callable(getattr(part, name))]
        assert len(public) <= 25, (type(part).__name__, public)

"""A small project with its own pytest process, for the tests of the plugins in tests/support."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


class PytestProject:
    """A folder with a `conftest.py` and test files."""

    def __init__(self, folder: Path, conftest: str, **files: str) -> None:
        self.folder = folder
        (folder / "conftest.py").write_text(conftest)
        (folder / "pytest.ini").write_text("[pytest]\n")
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)

    def run(self, *words: str) -> tuple[int, list[str]]:
        """Run pytest with pytest-xdist as its only plugin, and return its exit code and the lines of its output."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", *words]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

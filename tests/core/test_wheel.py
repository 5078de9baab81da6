"""The wheel holds the product and nothing else, and brings its types to users."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import tpo

ROOT = Path(__file__).parents[2]
PACKAGES = {"tpo", "api", "worker", "demo", "migrations"}

pytestmark = pytest.mark.processes

USER = """
from typing import assert_type

from tpo.client import Client, Job

with Client("http://127.0.0.1:8000", api_key="a-key") as client:
    assert_type(client.submit("a prompt", idempotency_key="a-key"), Job)
    assert_type(client.get("job_1")["output"], str | None)
    client.submit(3)  # error: arg-type
    client.submit("a prompt", idempotency_key=3)  # error: arg-type
    client.get("job_1")["no_such_field"]  # error: typeddict-item
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT))
    (file,) = folder.iterdir()
    return file


def run(*words: str, cwd: Path | None = None) -> str:
    """Run Python and return what it prints."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_only_the_product(wheel: Path) -> None:
    folders = {name.partition("/")[0] for name in names(wheel)}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == PACKAGES


def test_wheel_holds_every_file_of_the_product(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *sorted(PACKAGES)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {name for name in listed.stdout.split("\0") if name}
    assert tracked - names(wheel) == set()


@pytest.mark.parametrize("package", ["tpo", "api", "worker"])
def test_wheel_is_typed(wheel: Path, package: str) -> None:
    assert f"{package}/py.typed" in names(wheel)


def test_wheel_requires_no_developer_tools(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    assert metadata.get_all("Provides-Extra") == ["local"]
    assert not [each for each in metadata.get_all("Requires-Dist", []) if each.startswith(("pytest", "mypy", "ruff"))]


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel, and with the other packages of this environment."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # A folder named in a .pth file is searched; the .pth files in that folder, which name this checkout, are not read.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_wheel_gives_the_command(user: Path, tmp_path: Path) -> None:
    def output_of(*words: str | Path) -> str:
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert output_of(user.with_name("tpo"), "--version") == f"tpo {tpo.__version__}\n"
    assert Path(output_of(user, "-c", "import tpo; print(tpo.__file__)")).is_relative_to(user.parents[1])


def test_wheel_brings_the_types_of_the_client(user: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(USER)
    command = ["-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "--no-error-summary", "--no-pretty"]
    checked = subprocess.run(
        [sys.executable, *command, "--python-executable", str(user), "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^program.py:(\d+): error: .* \[(.*)\]$", checked.stdout, re.MULTILINE)
    expected = [
        (str(number), line.partition("# error: ")[2]) for number, line in enumerate(USER.splitlines(), 1) if "#" in line
    ]
    assert found == expected, checked.stdout + checked.stderr

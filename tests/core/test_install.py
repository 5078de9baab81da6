"""`make install` and `make develop`: what they run, and what they show."""

import os
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.processes

Install = Callable[..., "subprocess.CompletedProcess[str]"]

PIP = """
import os, sys

with open(os.environ["CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
print("Collecting alpha", flush=True)
if "--editable" in sys.argv and "FAILS" in os.environ:
    sys.exit("ERROR: the reason")
print("Successfully installed alpha-1.0 beta-2.0")
"""


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Run the script in an environment of its own, with a pip that only records how it is called."""
    venv.create(tmp_path / "venv", symlinks=True)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(PIP)

    def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CALLS": str(tmp_path / "calls"), **more}
        command = [str(tmp_path / "venv" / "bin" / "python"), str(ROOT / "scripts" / "install.py"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def calls(folder: Path) -> list[str]:
    return [line.partition("--no-input ")[2] for line in (folder / "calls").read_text().splitlines()]


def torch_that_requires(folder: Path, *packages: str) -> None:
    (folder / "torch-2.0.dist-info").mkdir()
    requires = "".join(f"Requires-Dist: {each}\n" for each in packages)
    (folder / "torch-2.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: 2.0\n{requires}"
    )


def test_install_shows_each_step(install: Install, tmp_path: Path) -> None:
    done = install("users", "torch==2.0 --index-url somewhere")
    assert done.returncode == 0, done.stderr
    first, *steps = done.stdout.splitlines()
    assert first == f"Installing into {tmp_path / 'venv'}"
    assert steps[::2] == [
        "[1/4] build tools, and what torch depends on",
        "[2/4] torch==2.0 --index-url somewhere",
        "[3/4] what TPO depends on",
        "[4/4] TPO itself",
    ]
    assert all(step.startswith("      2 packages, ") for step in steps[1::2])


def test_install_checks_hashes_of_all_but_torch(install: Install, tmp_path: Path) -> None:
    install("users", "torch==2.0 --index-url somewhere")
    assert calls(tmp_path) == [
        "--require-hashes --requirement requirements/build.txt --requirement requirements/torch.txt",
        "torch==2.0 --index-url somewhere",
        "--require-hashes --requirement requirements/local.txt",
        "--no-deps --no-build-isolation --editable .",
    ]


def test_install_ends_with_the_output_of_pip(install: Install, tmp_path: Path) -> None:
    done = install("users", "torch", FAILS="yes")
    assert done.returncode == 1
    assert f"failed; the whole output is in {tmp_path / 'venv' / 'install.log'}" in done.stdout
    assert done.stdout.endswith("ERROR: the reason\n")


@pytest.mark.parametrize(
    ("required", "triton_files"),
    [(["sympy"], ["triton"]), (['triton==3.0; platform_system == "Linux"'], []), (["pytorch-triton-rocm==3.0"], [])],
)
def test_developers_keep_the_triton_of_torch(
    install: Install, tmp_path: Path, required: list[str], triton_files: list[str]
) -> None:
    torch_that_requires(tmp_path, *required)
    done = install("developers")
    assert done.returncode == 0, done.stderr
    files = ["dev", *triton_files]
    assert calls(tmp_path) == [f"--require-hashes --requirement requirements/{file}.txt" for file in files]


def dry_run(target: str, folder: Path) -> str:
    """Return the commands that make would run for a target in a folder of its own."""
    done = subprocess.run(
        ["make", "--dry-run", "--makefile", str(ROOT / "Makefile"), target],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Return a folder with the files that the installation needs, and without an environment."""
    for name in ("requirements", "scripts", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("target", ["install", "demo", "up", "demo-models"])
def test_make_gives_users_no_developer_tools(target: str, fresh: Path) -> None:
    commands = dry_run(target, fresh)
    assert "install.py users 'torch==" in commands
    assert "install.py developers" not in commands


@pytest.mark.parametrize(
    "target", ["test", "test-fast", "check", "format", "fuzz", "chaos", "servers", "bench", "evaluate"]
)
def test_make_gives_developers_their_tools(target: str, fresh: Path) -> None:
    commands = dry_run(target, fresh)
    assert commands.index("install.py users") < commands.index("install.py developers")


MAKE_VENV = """#!/bin/sh
mkdir -p $1/bin
printf '#!/bin/sh\\necho "$@" >> calls\\n' > $1/bin/python
chmod +x $1/bin/python
"""


def test_make_gives_each_build_of_torch_its_environment(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make-venv").write_text(MAKE_VENV)
    (tmp_path / "scripts" / "make-venv").chmod(0o755)
    (tmp_path / "scripts" / "install.py").touch()
    for name in ("requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    kept = tmp_path / ".venv" / "kept"

    def install(torch: str) -> list[str]:
        command = ["make", "--makefile", str(ROOT / "Makefile"), "install", f"TORCH={torch}"]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        return (tmp_path / "calls").read_text().splitlines()

    first = ["scripts/install.py users torch==1.0"]
    assert install("torch==1.0") == first
    kept.touch()
    assert install("torch==1.0") == first
    assert kept.exists()
    assert install("torch==1.0 --index-url other") == [*first, "scripts/install.py users torch==1.0 --index-url other"]
    assert not kept.exists()


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[1] for line in shown.splitlines()}
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (phony,) = [line.split()[1:] for line in text.splitlines() if line.startswith(".PHONY")]
    assert listed == set(phony)

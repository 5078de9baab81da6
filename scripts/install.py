"""Install TPO into the virtual environment whose Python runs this, and show each step.

    .venv/bin/python scripts/install.py users 'torch==2.13.0'
    .venv/bin/python scripts/install.py developers

Everything but torch is pinned and checked by its hash (`requirements/`). torch is installed by name, so that its build
can be chosen. The packages that every build of torch needs are pinned too and installed before it.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = Path(sys.prefix)
LOG = ENVIRONMENT / "install.log"
LINES_OF_A_FAILURE = 30

Step = tuple[str, list[str]]
"""What a step installs, and the arguments of `pip install` for it."""


def pinned(*names: str) -> list[str]:
    """Return the arguments that install files of requirements, with every hash checked."""
    return ["--require-hashes", *(word for name in names for word in ("--requirement", f"requirements/{name}.txt"))]


def users(torch: str) -> list[Step]:
    """Return the steps that install what a user needs."""
    return [
        ("build tools, and what torch depends on", pinned("build", "torch")),
        (torch, shlex.split(torch)),
        ("what TPO depends on", pinned("local")),
        ("TPO itself", ["--no-deps", "--no-build-isolation", "--editable", "."]),
    ]


def developers() -> list[Step]:
    """Return the steps that add what tests, checks and benchmarks need."""
    steps: list[Step] = [("tools for tests, checks and benchmarks", pinned("dev"))]
    # A CUDA build of torch depends on exactly the Triton that it was compiled for: that one stays.
    if not any(re.match(r"(pytorch-)?triton\b", each) for each in metadata.requires("torch") or ()):
        steps.append(("Triton, whose interpreter runs the kernels in tests", pinned("triton")))
    return steps


def run(head: str, arguments: list[str]) -> None:
    """Run `pip install`; exit with its code and the end of its output if it fails."""
    show(head)
    began = time.monotonic()
    installed: list[str] = []
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    pip = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    with LOG.open("a") as log, pip.stdout or sys.stdin as output:
        print("$", shlex.join(command), file=log)
        for line in output:
            log.write(line)
            if line.startswith("Successfully installed"):
                installed = line.split()[2:]
            if sys.stdout.isatty() and (activity := activity_in(line)):
                show(f"{head}: {activity}")
    if pip.wait():
        tail = LOG.read_text().splitlines()[-LINES_OF_A_FAILURE:]
        finish(head, f"failed; the whole output is in {LOG}", "", *tail)
        sys.exit(pip.returncode)
    finish(head, f"{len(installed) or 'no new'} package{'s'[: len(installed) != 1]}, {time.monotonic() - began:.0f} s")


def activity_in(line: str) -> str | None:
    """Return what pip says that it is doing, as a few words."""
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    if found := re.match(r" *(Downloading|Using cached|Processing) +(\S+)(?: (\(\S+ \S+\)))?", line):
        return f"{found[1].lower()} {Path(found[2]).name} {found[3] or ''}".rstrip()
    return None


def show(text: str) -> None:
    """Show a line: on a terminal in place of the one before."""
    if sys.stdout.isatty():
        print("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
    else:
        print(text, flush=True)


def finish(head: str, *result: str) -> None:
    """End a step with its result."""
    if sys.stdout.isatty():
        show(head)
        print(":", *result[:1])
    else:
        print("     ", *result[:1])
    print(*result[1:], sep="\n", end="\n" if result[1:] else "", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["users", torch]:
            steps = users(torch)
        case ["developers"]:
            steps = developers()
        case _:
            sys.exit(__doc__)
    LOG.unlink(missing_ok=True)
    print("Installing into", ENVIRONMENT)
    for number, (what, arguments) in enumerate(steps, 1):
        run(f"[{number}/{len(steps)}] {what}", arguments)

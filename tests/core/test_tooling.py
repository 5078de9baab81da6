"""The files around the code agree with each other: make, CI, the hooks of pre-commit, the image."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in read(file)["jobs"].values() for step in job["steps"]]


def recipe(target: str) -> list[str]:
    """Return the commands of a target of make."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_workflows_run_what_ci_runs() -> None:
    assert {step["run"] for file in WORKFLOWS for step in steps(file) if "run" in step} == {".ci/run", ".ci/smoke"}
    for name in ("run", "smoke"):
        assert os.access(ROOT / ".ci" / name, os.X_OK)


def test_ci_checks_builds_the_site_and_tests() -> None:
    commands = re.findall(r"^(?:exec )?(make .*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == ["make check", "make docs", "make test"]
    assert ".docs/bin/mkdocs build --clean --strict" in " ".join(recipe("docs"))


def test_workflows_cover_every_declared_python() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = {each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)}
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    named = [
        step["with"]["python-version"]
        for job in jobs.values()
        for step in job["steps"]
        if "setup" in step.get("uses", "")
    ]
    covered = {*jobs["install"]["strategy"]["matrix"]["python"], *named} - {"${{ matrix.python }}"}
    assert covered == declared


def test_workflows_keep_no_credentials() -> None:
    checkouts = [
        step for file in WORKFLOWS for step in steps(file) if step.get("uses", "").startswith("actions/checkout")
    ]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_by_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_hooks_run_what_check_runs() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    on_the_code = [line for line in recipe("check") if re.match(r"\.venv/bin/(ruff|mypy|lint-imports)\b", line)]
    assert hooks == [re.sub(r" --check \.$| \.$", "", line) for line in on_the_code]


def test_check_validates_every_workflow_and_form() -> None:
    commands = "\n".join(recipe("check"))
    for part in (
        "vendor.github-workflows",
        "vendor.github-issue-forms",
        "vendor.github-issue-config",
        "zizmor --offline",
    ):
        assert part in commands


def test_image_holds_what_is_pinned() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    commands = re.findall(r"pip install ([^&\n]*)", dockerfile)
    assert [command.split()[-1] for command in commands if "--require-hashes" in command] == [
        "requirements/torch.txt",
        "requirements/local.txt",
        "requirements/build.txt",
    ]
    others = [command.strip() for command in commands if "--require-hashes" not in command]
    assert others == ["${TORCH}", "--no-deps wheels/tpo-*.whl"]


def test_torch_has_one_default_build() -> None:
    files = ("Makefile", "Dockerfile", "docker-compose.yml", ".github/workflows/ci.yml")
    default = re.compile(r"^(?:ARG | *)TORCH(?: \?= |=\"|: .*(?:-|'))(torch==[\d.]+)\b", re.MULTILINE)
    found = {file: default.findall((ROOT / file).read_text()) for file in files}
    assert len({tuple(versions) for versions in found.values()}) == 1, found
    assert all(len(versions) == 1 for versions in found.values()), found


def test_changelog_has_an_unreleased_section() -> None:
    sections = re.findall(r"^(##+) (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == ("##", "[Unreleased]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {title for level, title in sections if level == "###"} <= kinds
    assert all(
        re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for level, title in sections[1:] if level == "##"
    )

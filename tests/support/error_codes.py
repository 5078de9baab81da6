"""The error codes of the API, collected from its source so that they are not listed a second time."""

import ast
from pathlib import Path

from api.errors import CODES

ROOT = Path(__file__).parents[2]
NOT_IN_RESPONSES = {"backend_unavailable", "queue_unavailable", "key_not_found"}
"""Codes that appear only in the record of a job, or in errors that only commands raise."""


def codes() -> set[str]:
    """Return the codes of all errors that a response can contain.

    Errors of jobs are excluded: a chat completion reports them under their own codes.
    """
    found = set(CODES.values())
    for file in (*(ROOT / "api").rglob("*.py"), ROOT / "tpo" / "jobs" / "quotas.py"):
        found |= _codes_of_calls(ast.parse(file.read_text()))
    found |= _codes_of_classes(ast.parse((ROOT / "tpo" / "core" / "errors.py").read_text()))
    return found - NOT_IN_RESPONSES


def _codes_of_calls(tree: ast.Module) -> set[str]:
    """Return the codes of calls: `problem(code="…")`, and the second argument of QuotaExceededError."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if getattr(node.func, "id", "") == "problem":
            values = [word.value for word in node.keywords if word.arg == "code"]
        elif getattr(node.func, "id", "") == "QuotaExceededError":
            values = [node.args[1]]
        else:
            continue
        found |= {each.value for each in values if isinstance(each, ast.Constant)}
    return {code for code in found if isinstance(code, str)}


def _codes_of_classes(tree: ast.Module) -> set[str]:
    """Return the class attributes `code = "…"` of the errors that are not errors of jobs."""
    bases = {
        node.name: [getattr(base, "id", "") for base in node.bases]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    def is_job_error(name: str) -> bool:
        return name == "JobError" or any(is_job_error(base) for base in bases.get(name, []))

    return {
        str(line.value.value)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not is_job_error(node.name)
        for line in node.body
        if isinstance(line, ast.Assign)
        and getattr(line.targets[0], "id", "") == "code"
        and isinstance(line.value, ast.Constant)
    }

"""Which codes the API's errors can have, read off its source: none is written down in a second place."""

import ast
from pathlib import Path

from api.errors import CODES

ROOT = Path(__file__).parents[2]
NOT_OF_THE_API = {"backend_unavailable", "queue_unavailable", "key_not_found"}
"""Codes in a job's record, and of errors that only commands raise."""


def codes() -> set[str]:
    """Of all errors that stand in an answer: a chat's, which can be any job's, are told by their names there."""
    found = set(CODES.values())
    for file in (*(ROOT / "api").rglob("*.py"), ROOT / "tpo" / "jobs" / "quotas.py"):
        found |= _said(ast.parse(file.read_text()))
    found |= _of_classes(ast.parse((ROOT / "tpo" / "core" / "errors.py").read_text()))
    return found - NOT_OF_THE_API


def _said(tree: ast.Module) -> set[str]:
    """`problem(code="…")`, and the code that QuotaExceededError is raised with."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if getattr(node.func, "id", "") == "problem":
            given = [word.value for word in node.keywords if word.arg == "code"]
        elif getattr(node.func, "id", "") == "QuotaExceededError":
            given = [node.args[1]]
        else:
            continue
        found |= {each.value for each in given if isinstance(each, ast.Constant)}
    return {code for code in found if isinstance(code, str)}


def _of_classes(tree: ast.Module) -> set[str]:
    """`code = "…"` of the errors that are no job's."""
    bases = {
        node.name: [getattr(base, "id", "") for base in node.bases]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    def of_a_job(name: str) -> bool:
        return name == "JobError" or any(of_a_job(base) for base in bases.get(name, []))

    return {
        str(line.value.value)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not of_a_job(node.name)
        for line in node.body
        if isinstance(line, ast.Assign)
        and getattr(line.targets[0], "id", "") == "code"
        and isinstance(line.value, ast.Constant)
    }

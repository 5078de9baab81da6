"""Read the pinned requirements, and what pyproject.toml and the installed packages require."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
FILES = ("audit", "build", "dev", "docs", "local", "mutants", "runtime", "torch", "triton")
"""What `make lock` writes."""

Environment = dict[str, str]
"""Values of environment markers that differ from those of this machine."""


@dataclass(frozen=True)
class Pin:
    """One line of a file: a requirement and the hashes of the archives that it may be installed from."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def version(self) -> str:
        """Return the only version that the line allows. Raises ValueError if it allows others."""
        (specifier,) = self.requirement.specifier
        if specifier.operator != "==" or "*" in specifier.version:
            raise ValueError(f"{self.requirement} is not pinned")
        return specifier.version

    def applies_to(self, environment: Environment) -> bool:
        """Return whether pip installs it in such an environment."""
        marker = self.requirement.marker
        return marker is None or marker.evaluate(environment)


def lines(file: str) -> list[str]:
    """Return the logical lines of a file, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / f"{file}.txt").read_text(), flags=re.MULTILINE)
    return text.replace("\\\n", " ").splitlines()


def pins(file: str) -> dict[str, Pin]:
    """Return the lines of a file by their packages."""
    found: dict[str, Pin] = {}
    for line in lines(file):
        words, *hashes = line.split("--hash=")
        requirement = Requirement(words)
        found[canonicalize_name(requirement.name)] = Pin(requirement, tuple(each.strip() for each in hashes))
    return found


def declared(*groups: str, project: bool = False, extra: str | None = None) -> list[Requirement]:
    """Return what pyproject.toml asks for, in groups of dependencies, for the project itself, or in an extra."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = [each for group in groups for each in _group(content["dependency-groups"], group)]
    if project:
        found += content["project"]["dependencies"]
    if extra:
        found += content["project"]["optional-dependencies"][extra]
    return [Requirement(each) for each in found]


def _group(groups: Mapping[str, list[Any]], name: str) -> list[str]:
    """Return the requirements of a group and of those that it includes."""
    found = []
    for each in groups[name]:
        found += [each] if isinstance(each, str) else _group(groups, each["include-group"])
    return found


def missing_from(file: str, wanted: Iterable[Requirement], environment: Environment) -> list[str]:
    """Return which of these requirements, and of all that they require in turn, a file does not meet."""
    pinned = {name: pin for name, pin in pins(file).items() if pin.applies_to(environment)}
    missing, seen, open_ = [], set(), [*wanted]
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        pin = pinned.get(name)
        if pin is None or not requirement.specifier.contains(pin.version):
            missing.append(str(requirement))
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                open_ += required_by(name, extra, environment)
    return missing


def required_by(package: str, extra: str, environment: Environment) -> list[Requirement]:
    """Return what a package requires in such an environment; of one that is not installed, nothing is known."""
    try:
        requires = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(each) for each in requires]
    return [each for each in found if each.marker is None or each.marker.evaluate({**environment, "extra": extra})]

"""Hooks of the documentation site: pages from outside `docs/`, generated pages, and a check for foreign assets."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "build" / "docs"
"""The folder of the pages that `make docs` generates."""

OUTSIDE = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "demo/RESULTS.md": "project/results.md",
    "demo/TRANSCRIPTS.md": "project/transcripts.md",
    "demo/results.png": "project/results.png",
    "examples/README.md": "project/examples.md",
}
"""Files of the project that are part of the site, by their paths, with their places in the site."""

_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^\[([\w/.-]+\.(py|toml))\]\(\1\)$", re.MULTILINE)
_ASSET = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)")
_CSS_ASSET = re.compile(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and those from outside `docs/`."""
    for page in sorted(GENERATED.glob("*.md")):
        files.append(File.generated(config, page.name, abs_src_path=str(page)))
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_others: Any) -> str:
    """Point links at the places of their files in the site, and show the code that the page on examples names."""
    place = page.file.src_uri
    outside = next((path for path, each in OUTSIDE.items() if each == place), None)
    folder = PurePosixPath(outside or f"docs/{place}").parent

    def link(found: re.Match[str]) -> str:
        target = _place(normpath(str(folder / found[2])))
        return f"{found[1]}{relpath(target, PurePosixPath(place).parent) if target else found[2]}{found[3] or ''}"

    def code(found: re.Match[str]) -> str:
        return f'```{found[2]} title="{folder / found[1]}"\n{(ROOT / folder / found[1]).read_text()}```'

    return _LINK.sub(link, _CODE.sub(code, markdown))


def _place(path: str) -> str | None:
    """Return the place in the site of a file of the project, or None if it has none."""
    inside = path.removeprefix("docs/")
    return OUTSIDE.get(path) or (inside if inside != path else None)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page or a style sheet loads anything from another host."""
    if found := sorted(set(_foreign_assets(Path(config.site_dir)))):
        raise PluginError("The site loads files from other hosts:\n" + "\n".join(found))


def _foreign_assets(site: Path) -> Iterator[str]:
    for pattern, search in (("*.html", _ASSET), ("*.css", _CSS_ASSET)):
        for file in site.rglob(pattern):
            for address in search.findall(file.read_text(encoding="utf-8")):
                yield f"{file.relative_to(site)}: {address}"

"""Check that versions, changelogs, tags, ranges and metadata of the four packages agree (``nox -s release``).

Usage: ``python tests/check_release.py [PACKAGE ...]``. The packages that are named are about to be
released: they need a dated section in their changelogs, and URLs that are not placeholders.
See docs/releasing.md.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

PACKAGES = ("syncbn-comm", "syncbn-core", "syncbn-parallel", "syncbn-convert")
PLACEHOLDER = ".invalid/"
ALIKE = ("requires-python", "license", "license-files", "authors", "readme")
UNRELEASED = "## [Unreleased]"


class Package:
    """The version, the changelog and the metadata of one package."""

    def __init__(self, root: Path, name: str) -> None:
        folder = root / "packages" / name
        module = name.replace("-", "_")
        self.name = name
        self.project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        self.changelog = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
        source = (folder / "src" / module / "__init__.py").read_text(encoding="utf-8")
        self.versions = re.findall(r'^__version__ = "([^"]*)"$', source, flags=re.MULTILINE)
        self.version = self.versions[0] if self.versions else ""

    @property
    def siblings(self) -> list[Requirement]:
        """The requirements that name other packages of this repository."""
        requirements = map(Requirement, self.project.get("dependencies", []))
        return [requirement for requirement in requirements if requirement.name in PACKAGES]

    def head_of_changelog(self) -> str:
        """Return the text above the first section, without the name of the package."""
        return self.changelog.partition("\n## ")[0].replace(self.name, "")

    def has_section(self) -> bool:
        """Tell whether the changelog has a dated section for the version."""
        heading = rf"^## \[{re.escape(self.version)}\] - \d{{4}}-\d\d-\d\d$"
        return re.search(heading, self.changelog, flags=re.MULTILINE) is not None


def problems(packages: list[Package], releasing: list[str], tags: list[str]) -> Iterator[str]:
    """Yield a message for each thing that does not agree."""
    by_name = {package.name: package for package in packages}
    for package in packages:
        yield from _problems_of_version(package)
        headings = [line for line in package.changelog.splitlines() if line.startswith("## ")]
        if headings[:1] != [UNRELEASED]:
            yield f"{package.name}: expected {UNRELEASED!r} first in the changelog, got {headings[:1]}"
        if package.head_of_changelog() != packages[0].head_of_changelog():
            yield f"{package.name}: expected the changelog to begin as in {packages[0].name}"
        for requirement in package.siblings:
            version = by_name[requirement.name].version
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{package.name}: expected {requirement} to contain {version}"
        for key in ALIKE:
            if package.project.get(key) != packages[0].project.get(key):
                value = package.project.get(key)
                yield f"{package.name}: expected {key} as in {packages[0].name}, got {value}"
        if set(package.project.get("urls", {})) != set(packages[0].project.get("urls", {})):
            yield f"{package.name}: expected the same project URLs as {packages[0].name}"
        if "<" in package.project.get("requires-python", ""):
            yield f"{package.name}: expected no upper cap on Python"
        if package.name in releasing:
            yield from _problems_of_release(package)
    yield from _problems_of_tags(by_name, tags)


def _problems_of_version(package: Package) -> Iterator[str]:
    if len(package.versions) != 1 or package.project.get("dynamic") != ["version"]:
        yield f"{package.name}: expected __version__ in __init__.py as the only place of the version"
        return
    try:
        Version(package.version)
    except InvalidVersion:
        yield f"{package.name}: expected a version, got {package.version!r}"


def _problems_of_release(package: Package) -> Iterator[str]:
    if not package.has_section():
        yield f"{package.name}: expected '## [{package.version}] - YYYY-MM-DD' in the changelog"
    placeholders = [url for url in package.project.get("urls", {}).values() if PLACEHOLDER in url]
    if placeholders:
        yield f"{package.name}: expected the repository's address in project.urls, got {placeholders[0]}"


def _problems_of_tags(by_name: dict[str, Package], tags: list[str]) -> Iterator[str]:
    for tag in tags:
        name, _, version = tag.rpartition("-v")
        if name not in by_name:
            continue
        if version != by_name[name].version:
            yield f"tag {tag}: expected the version of {name}, which is {by_name[name].version}"
        if not by_name[name].has_section():
            yield f"tag {tag}: expected a dated section for {version} in the changelog of {name}"


def tags_of_this_commit(root: Path) -> list[str]:
    """Return the tags of the current commit; none outside a repository."""
    command = ["git", "-C", str(root), "tag", "--points-at", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def main() -> None:
    """Print what does not agree, and fail if there is anything."""
    root = Path(__file__).parents[1]
    releasing = sys.argv[1:]
    if unknown := set(releasing) - set(PACKAGES):
        sys.exit(f"expected names out of {PACKAGES}, got {sorted(unknown)}")
    packages = [Package(root, name) for name in PACKAGES]
    found = list(problems(packages, releasing, tags_of_this_commit(root)))
    if found:
        sys.exit("\n".join(found))
    print("versions, changelogs, tags, ranges and metadata agree")


if __name__ == "__main__":
    main()

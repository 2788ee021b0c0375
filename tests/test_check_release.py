"""The check before a release finds versions, changelogs, tags and metadata that do not agree."""

import runpy
import shutil
from pathlib import Path

import pytest

pytest.importorskip("packaging")

ROOT = Path(__file__).parents[1]
check = runpy.run_path(str(Path(__file__).with_name("check_release.py")))
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n\n### Added\n\n- All.\n"


@pytest.fixture
def copy_of_packages(tmp_path):
    """Copy what the check reads, with changelogs as they are after a release."""
    for name in check["PACKAGES"]:
        folder = tmp_path / "packages" / name
        source = Path("src") / name.replace("-", "_") / "__init__.py"
        (folder / source).parent.mkdir(parents=True)
        for path in (source, Path("pyproject.toml")):
            shutil.copy(ROOT / "packages" / name / path, folder / path)
        (folder / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def edit(root, path, old, new):
    path = root / "packages" / path
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def problems(root, releasing=(), tags=()):
    packages = [check["Package"](root, name) for name in check["PACKAGES"]]
    return list(check["problems"](packages, list(releasing), list(tags)))


def test_packages_that_agree_have_no_problems(copy_of_packages):
    assert problems(copy_of_packages, tags=["syncbn-core-v0.1.0", "some-other-tag"]) == []


CORE_INIT = "syncbn-core/src/syncbn_core/__init__.py"


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        (CORE_INIT, '"0.1.0"', '"0.2.0"', "syncbn-convert: expected syncbn-core"),
        (CORE_INIT, '"0.1.0"', '"next"', "expected a version, got 'next'"),
        ("syncbn-comm/CHANGELOG.md", "## [Unreleased]\n", "", "first in the changelog"),
        ("syncbn-core/CHANGELOG.md", "# Changelog", "# Changes", "the changelog to begin as in syncbn-comm"),
        ("syncbn-comm/pyproject.toml", '">=3.11"', '">=3.11,<4"', "no upper cap on Python"),
        ("syncbn-parallel/pyproject.toml", '"MIT"', '"BSD"', "syncbn-parallel: expected license as in"),
        ("syncbn-core/pyproject.toml", "Issues = ", "Bugs = ", "the same project URLs"),
    ],
)
def test_a_disagreement_is_named(path, old, new, problem, copy_of_packages):
    edit(copy_of_packages, path, old, new)

    assert any(problem in found for found in problems(copy_of_packages))


def test_a_tag_of_another_version_is_named(copy_of_packages):
    assert "tag syncbn-core-v0.3.0" in problems(copy_of_packages, tags=["syncbn-core-v0.3.0"])[0]


def test_a_release_needs_a_dated_section_and_real_addresses(copy_of_packages):
    edit(copy_of_packages, "syncbn-core/CHANGELOG.md", "## [0.1.0] - 2026-12-01", "## [0.1.0] - soon")

    section, address = problems(copy_of_packages, releasing=["syncbn-core"])
    assert "## [0.1.0] - YYYY-MM-DD" in section
    assert "expected the repository's address" in address

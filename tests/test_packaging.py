"""What is installed is what the files of the package say: pins, licence, contents of the sdist."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WITHOUT = {"gpu"}  # never installed where the suite runs


def needed() -> dict[str, str]:
    """Installed versions of all that cspd's extras reach, without local suffixes."""
    extras = set(importlib.metadata.metadata("cspd").get_all("Provides-Extra")) - WITHOUT
    todo, seen, found = [("cspd", frozenset(extras))], set(), {}
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment lacks
        found[canonicalize_name(name)] = Version(distribution.version).public
        for text in distribution.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", *wanted}):
                todo.append((requirement.name, frozenset(requirement.extras)))
    del found["cspd"]
    return found


def test_constraints_pin_every_package_that_is_needed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: pins.get(name) for name in needed()} == needed()
    assert not any("+" in version for version in pins.values())


def test_the_licence_is_named_and_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_begins_with_what_is_not_released():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == "Unreleased" and version in headings


def test_the_sdist_is_told_to_hold_what_the_tests_need():
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    assert {"tests", "docs", "Makefile", "constraints.txt"} <= set(manifest)

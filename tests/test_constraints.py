"""constraints.txt is the tested set: it pins every package that pyproject.toml asks for, inside its range."""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {normal(pin.name): pin for pin in found}


def asked() -> list[Requirement]:
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), PROJECT["build-system"]["requires"]]
    return [Requirement(line) for lines in lists for line in lines]


def test_every_direct_requirement_is_pinned_inside_its_range():
    known = pins()
    for wanted in asked():
        (version,) = known[normal(wanted.name)].specifier
        assert version.operator == "=="
        assert wanted.specifier.contains(version.version), f"{wanted} does not allow {version.version}"


def test_pins_are_exact_public_versions_without_paths():
    for pin in pins().values():
        (version,) = pin.specifier
        assert version.operator == "=="
        assert "+" not in version.version, f"{pin}: a local build is not on the index"
        assert pin.url is None

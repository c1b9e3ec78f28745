"""The versions that are said to be tested are the same wherever they are said."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ldmole_ds.distributed.deepspeed_private import TESTED_VERSION
from ldmole_ds.doctor import support
from ldmole_ds.doctor.support import TESTED, is_tested, untested

ROOT = Path(__file__).resolve().parent.parent


def specifiers() -> dict[str, SpecifierSet]:
    """Those of pyproject.toml, by package; python among them."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"(.+?)"', re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1))
    found = {r.name: r.specifier for r in map(Requirement, listed)}
    return {**found, "python": SpecifierSet(re.search(r'requires-python = "(.+)"', text).group(1))}


@pytest.mark.parametrize("package", TESTED)
def test_pyproject_begins_with_the_lowest_tested(package):
    specifier, (lowest, highest) = specifiers()[package], TESTED[package]
    assert specifier.contains(lowest) and specifier.contains(highest)
    bounds = [s.version for s in specifier if s.operator == ">="]
    assert len(bounds) == 1 and (lowest == bounds[0] or lowest.startswith(bounds[0] + "."))


@pytest.mark.parametrize("package", TESTED)
def test_the_readme_has_the_range(package):
    lowest, highest = TESTED[package]
    assert f"| {package} | {lowest} | {highest} |" in (ROOT / "README.md").read_text()


def test_the_error_of_a_changed_deepspeed_has_the_range():
    (stated,) = re.findall(r"pip install '(.+?)'", TESTED_VERSION)
    assert Requirement(stated).specifier == specifiers()["deepspeed"]


def test_the_setup_script_has_the_range():
    low, high = (tuple(map(int, version.split(".")[:2])) for version in TESTED["torch"])
    script = (ROOT / "launch/setup_venv.sh").read_text()
    assert f"{low} <= (major, minor) < {(high[0], high[1] + 1)}" in script


def test_what_is_inside_the_range():
    lowest, highest = TESTED["transformers"]
    assert is_tested("transformers", lowest) and is_tested("transformers", highest)
    assert is_tested("transformers", f"{highest.rsplit('.', 1)[0]}.9") and is_tested("torch", "2.13.0+cpu")
    assert not any(is_tested("transformers", v) for v in ("4.57.6", "5.3.0", "6.0.0", "not installed"))
    assert is_tested("python", "3.11.7") and not is_tested("python", "3.9.2")
    assert untested({"torch": "2.13.0", "deepspeed": "0.18.0", "numpy": "1.0"}) == ["deepspeed"]
    assert support.tested_range("transformers") == f"{lowest} to {highest}"

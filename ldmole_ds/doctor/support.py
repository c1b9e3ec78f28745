"""The versions the tests were run with, lowest and highest; README.md and pyproject.toml state the same."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

TESTED = {
    "python": ("3.10", "3.11"),
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.4.0", "5.23.0"),
    "deepspeed": ("0.19.3", "0.19.8"),
    "accelerate": ("1.10.0", "1.15.0"),
    "datasets": ("4.0.0", "5.2.0"),
}


def is_tested(package: str, version: str) -> bool:
    """Whether a version lies in the tested range; later patch releases of the highest count as tested."""
    lowest, highest = (Version(bound) for bound in TESTED[package])
    try:
        found = Version(version)
    except InvalidVersion:  # "not installed"
        return False
    return found >= lowest and found.release[:2] <= highest.release[:2]


def tested_range(package: str) -> str:
    """``2.13.0``, or ``5.0.0 to 5.23.0``."""
    lowest, highest = TESTED[package]
    return lowest if lowest == highest else f"{lowest} to {highest}"


def untested(versions: Mapping[str, str]) -> list[str]:
    """Packages whose version lies outside of the tested range."""
    return [package for package in TESTED if package in versions and not is_tested(package, versions[package])]

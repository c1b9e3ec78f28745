"""Flags from a file: ``launch/train.py run.yaml --r 16``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path

import yaml

from ldmole_ds.training.runtime import UserError


def read_settings_file(path: Path) -> dict:
    """A flat YAML or JSON mapping of flags without their dashes."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a YAML or JSON file of settings, or flags only")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings, such as `r: 16`")
    return values


def as_argv(values: dict, known: Collection[str], path: Path) -> list[str]:
    """The settings as command-line flags.

    Raises:
        UserError: A setting is not one of the flags in ``known``.
    """
    argv: list[str] = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f": did you mean {close[0]}?" if close else ": see --help_all"
            raise UserError(f"{path}: unknown setting {key!r}{hint}")
        if value is None:
            continue
        argv.append(f"--{key}")
        if isinstance(value, list):
            argv.extend(map(str, value))
        else:
            argv.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return argv

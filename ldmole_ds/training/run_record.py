"""What a run was: settings, versions, git revision; and the guard that keeps one run from overwriting another."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldmole_ds.config import CONFIG_NAME

SETTINGS_NAME = "run_settings.json"
ANSWERS_NAME = "heldout_answers.json"
_PACKAGES = ("ldmole_ds", "torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors")


def check_output_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        ValueError: Names the flags that say otherwise.
        OSError: The folder cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: give a folder")
    held = [name for name in (SETTINGS_NAME, CONFIG_NAME, "trainer_state.json") if (folder / name).exists()]
    held += [p.name for p in folder.glob("checkpoint-*")] if folder.is_dir() else []
    if held and not overwrite and not resume:
        raise ValueError(
            f"--output_dir {folder} already holds a run ({held[0]}): choose another folder, pass "
            "--overwrite_output_dir, or continue it with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` when changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of python and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_settings(**groups: Any) -> dict[str, Any]:
    """Everything needed to repeat the run, as JSON types."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": git_revision(),
        "versions": versions(),
        **groups,
    }


def write_json(path: Path, values: Any) -> None:
    """Readable JSON; what JSON cannot hold is written as its text."""
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")

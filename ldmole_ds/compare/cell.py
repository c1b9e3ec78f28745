"""One cell of a comparison: a command, the folder it fills, and the record that it is done, with its settings."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmole_ds.training.run_record import git_revision, versions

STARTED_NAME = "cell_started.json"


@dataclass(frozen=True)
class Cell:
    """A process to run.

    Attributes:
        title: For people.
        command: What is run, the output folder included.
        folder: What it fills.
        settings: All that its result depends on; a record with others is not a result of this cell.
        outputs: From a name to the JSON file in the folder that the process writes.
        record: Name of the file in the folder that holds the result, once there is one.
    """

    title: str
    command: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    outputs: dict[str, str]
    record: str

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.folder / f"{Path(self.record).stem}_log.txt"

    def result(self) -> dict[str, Any] | None:
        """The record, None while there is none.

        Raises:
            ValueError: There is one, made with other settings.
        """
        found = _read(self.folder / self.record)
        if found is None:
            return None
        changed = differences(found["settings"], self.settings)
        if changed:
            raise ValueError(
                f"{self.folder} was run with other settings ({'; '.join(changed)}): go on with those, choose another "
                f"--output_dir, or delete the folder"
            )
        return found

    def prepare(self) -> None:
        """Make the folder; what a run with other settings has left unfinished in it goes."""
        started = self.folder / STARTED_NAME
        if self.record == "cell.json" and self.folder.is_dir() and _read(started) != self.settings:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.record == "cell.json":
            write_atomically(started, self.settings)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Record what the process has written, at once or not at all.

        Raises:
            OSError: A file that it should have written is not there.
        """
        outputs = {name: json.loads((self.folder / file).read_text("utf-8")) for name, file in self.outputs.items()}
        result = {"settings": self.settings, "seconds": round(seconds, 1), **outputs}
        result |= {"versions": versions(), "git_revision": git_revision()}
        write_atomically(self.folder / self.record, result)
        return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``name: old, now new`` for each setting that differs."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'not set')}, now {new.get(name, 'not set')}" for name in names]


def write_atomically(path: Path, values: Any) -> None:
    """JSON that is either there whole or not there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None

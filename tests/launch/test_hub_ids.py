"""A hub id, read from the hub's cache on disk, as on compute nodes without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
for revision in ("main", "{commit}"):
    model = load_base_model("acme/tiny", revision=revision)
    print(revision, sum(p.numel() for p in model.parameters()), len(load_tokenizer("acme/tiny", revision=revision)))
try:
    load_base_model("acme/tiny", revision="missing")
except ValueError as error:
    print("refused:", error)
"""


def test_hub_ids_and_revisions_without_a_network(tiny_model_folder, tmp_path):
    repository = tmp_path / "models--acme--tiny"
    shutil.copytree(tiny_model_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD.format(commit=COMMIT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    main, commit, refused = [line for line in result.stdout.splitlines() if line]
    assert main.split()[1:] == commit.split()[1:]
    assert int(main.split()[1]) > 10_000
    assert refused.startswith("refused: --model_name_or_path 'acme/tiny' could not be loaded")

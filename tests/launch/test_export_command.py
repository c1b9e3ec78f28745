"""launch/export.py from the command line: what it says, and errors in one sentence."""

import importlib.util
import json

from ldmole_ds.config import CONFIG_NAME
from tests.launcher import ROOT
from tests.tiny import tiny_config, tiny_model

spec = importlib.util.spec_from_file_location("launch_export", ROOT / "launch" / "export.py")
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)


def test_a_checkpoint_takes_the_label_words_of_its_run(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    tiny_model(tiny_config(base_model_name_or_path="acme/base")).save_pretrained(run / "checkpoint-2")
    (run / "label_words.json").write_text('["yes", "no"]')
    flags = ["--adapter", str(run / "checkpoint-2"), "--output_dir", str(out), "--dtype", "bfloat16"]
    assert export.main([*flags, "--model_name_or_path", "acme/copy", "--revision", "v2"]) == 0
    assert "for acme/copy" in capsys.readouterr().out
    assert json.loads((out / "label_words.json").read_text()) == ["yes", "no"]
    config = json.loads((out / CONFIG_NAME).read_text())
    assert (config["adapter_dtype"], config["base_model_revision"]) == ("bfloat16", "v2")
    assert export.main(flags) == 2
    assert capsys.readouterr().err == f"error: {out} already exists: give a new folder\n"
    assert export.main(["--adapter", str(tmp_path / "none"), "--output_dir", str(tmp_path / "new")]) == 2
    assert "none does not exist: give the folder that holds" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]

"""launch/report.py: a page from an adapter's folder, and what can go wrong."""

import importlib.util
import json

import pytest

from ldmole_ds import get_ldmole_model
from ldmole_ds.analysis import encode_prompts
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from tests.launcher import ROOT
from tests.tiny import tiny_config


def test_tokens_join_to_their_prompt(tiny_model_folder):
    tokenizer = load_tokenizer(str(tiny_model_folder))
    (prompt,) = encode_prompts(tokenizer, ["book a flight\nto Rome"], 64)
    assert "".join(prompt.tokens) == "book a flight\nto Rome"
    assert (
        encode_prompts(tokenizer, ["book a flight"], 2)[0].ids
        == encode_prompts(tokenizer, ["book a flight"], 64)[0].ids[-2:]
    )


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("routing_report_script", ROOT / "launch" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = tiny_config(base_model_name_or_path=str(tiny_model_folder))
    get_ldmole_model(load_base_model(str(tiny_model_folder)), config).save_pretrained(folder)
    return folder


def test_the_script_writes_a_page(script, adapter, tmp_path, capsys):
    file, output = tmp_path / "prompts.txt", tmp_path / "new" / "page.html"
    file.write_text("book a flight\nwhat is my balance\n")
    flags = ["--adapter", str(adapter), "--device", "cpu"]
    assert script.main([*flags, "--prompt_file", str(file), "--output", str(output)]) == 0
    assert f"wrote {output}" in capsys.readouterr().out and f"2 of {file}" in output.read_text()
    # The task of the run that trained the adapter is the default.
    (adapter / "run_settings.json").write_text(json.dumps({"data": {"task": "clinc_domains", "max_length": 64}}))
    assert script.main([*flags, "--max_rows", "2"]) == 0
    assert "2 of clinc_domains" in (adapter / "routing_report.html").read_text()


def test_the_script_says_what_is_wrong(script, adapter, tmp_path, capsys, tiny_model_folder):
    flags = ["--adapter", str(adapter)]
    for more, message in (
        (["--task", "clinc_domain"], "did you mean clinc_domains"),
        (["--prompt_file", str(tmp_path / "none.txt")], "No such file"),
        (["--output", str(tmp_path)], "name a file"),
    ):
        assert script.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse([*flags, "--task", "cola", "--prompt_file", "x"])
    assert "give one of them" in capsys.readouterr().err

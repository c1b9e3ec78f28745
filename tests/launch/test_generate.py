"""launch/generate.py: one prompt or a file, with an adapter or a bare base, where nothing of the training stack is."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.model.generation import generate_texts
from tests.launcher import ROOT
from tests.tiny import wake_experts

PROMPTS = ["Message: freeze my card", "Topics", "Message: play some music\nTopic:", "pay a bill", "b"]


def module(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def adapted(tiny_model_folder, tmp_path_factory):
    """An adapter's folder, and its model in memory."""
    folder = tmp_path_factory.mktemp("generate") / "adapter"
    config = LDMoLEConfig(num_experts=4, r=2, lambda_hidden_size=16, base_model_name_or_path=str(tiny_model_folder))
    model = get_ldmole_model(load_base_model(str(tiny_model_folder)), config)
    wake_experts(model, std=1.0)
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture
def generate(capsys):
    """The script's main, in this process: exit code, what it printed, and its errors."""
    main = module("generate").main

    def run(*argv):
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [json.dumps({"id": i, "prompt": p}, ensure_ascii=False) for i, p in enumerate(PROMPTS)]
    path.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n", encoding="utf-8")
    return path


def one_by_one(model, tokenizer, prompts, **options):
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=False, do_sample=False, **options
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(("flags", "options"), [([], {}), (["--num_beams", "3"], {"num_beams": 3})])
def test_a_file_in_batches_is_one_prompt_at_a_time(adapted, generate, prompt_file, tmp_path, flags, options):
    folder, model = adapted
    expected = one_by_one(
        model, load_tokenizer(model.adapter_config.base_model_name_or_path), PROMPTS, **options, max_new_tokens=5
    )
    out = tmp_path / "out.jsonl"
    argv = ["--adapter", folder, "--prompt_file", prompt_file, "--output_file", out, "--batch_size", 2]
    code, _, errors = generate(*argv, "--max_new_tokens", 5, *flags)
    assert code == 0, errors
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"id": i, "prompt": p, "completion": t} for i, (p, t) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    assert "5/5" in errors and len(set(expected)) > 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_one_prompt_with_a_base_alone_and_with_an_adapter(adapted, generate, tiny_model_folder):
    folder, model = adapted
    tokenizer = load_tokenizer(str(tiny_model_folder))
    with model.disable_adapter():
        bare = one_by_one(model, tokenizer, PROMPTS[:1], max_new_tokens=6)[0]
    flags = ["--prompt", PROMPTS[0], "--max_new_tokens", "6"]
    _, with_adapter, _ = generate("--adapter", folder, *flags)
    code, alone, _ = generate("--model_name_or_path", tiny_model_folder, *flags)
    assert code == 0 and alone == bare + "\n" and with_adapter != alone


def test_sampling_is_seeded(adapted, generate):
    flags = ["--adapter", adapted[0], "--prompt", "b", "--temperature", 2.0, "--max_new_tokens", 12]
    texts = [generate(*flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = generate(*flags[:4], "--max_new_tokens", 12)[1]
    assert generate(*flags, "--top_k", 1)[1] == greedy != texts[0]


def test_a_checkpoint_folder_and_a_hub_id(adapted, generate, tmp_path, monkeypatch):
    from huggingface_hub import constants

    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(adapted[0], checkpoint)
    for name in ("optimizer.pt", "training_args.bin"):
        (checkpoint / name).write_bytes(b"not a pickle")
    repository = tmp_path / "models--acme--adapter"
    shutil.copytree(adapted[0], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    flags = ["--prompt", PROMPTS[0], "--max_new_tokens", "6"]
    expected = generate("--adapter", adapted[0], *flags)[:2]
    assert expected[0] == 0 and expected[1].strip()
    assert generate("--adapter", checkpoint, *flags)[:2] == expected
    (tmp_path / "label_words.json").write_text(json.dumps(["bank", "home"]))  # in the folder of the checkpoint's run
    assert generate("--adapter", checkpoint, "--classify", "--prompt", "pay a bill")[0] == 0
    assert generate("--adapter", "acme/adapter", "--adapter_revision", "v1", *flags)[:2] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a"], "give --adapter, or --model_name_or_path"),
        (["--adapter", "acme/none", "--prompt", "a"], "acme/none is no folder here"),
        (["--adapter", "ADAPTER", "--prompt", ""], "--prompt: the prompt has no tokens"),
        (["--adapter", "ADAPTER", "--prompt", "a " * 3000], "--prompt: 3001 tokens and 32 new ones are more than"),
        (["--adapter", "ADAPTER", "--prompt", "a", "--classify"], "was not trained on text and label rows"),
        (["--model_name_or_path", "BASE", "--prompt", "a", "--classify"], "--classify ranks the label words"),
        (["--adapter", "ADAPTER", "--prompt_file", "IN"], "--prompt_file and --output_file go together"),
        (["--adapter", "ADAPTER", "--prompt_file", "IN", "--output_file", "IN"], "already exists: give a new file"),
        (["--adapter", "ADAPTER", "--prompt_file", "IN", "--output_file", "no/o.jsonl"], "its folder does not exist"),
        (["--adapter", "ADAPTER", "--prompt_file", "missing.jsonl", "--output_file", "OUT"], "missing.jsonl"),
        (["--adapter", "ADAPTER", "--prompt", "a", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--adapter", "ADAPTER", "--prompt", "a", "--top_p", "0"], "--top_p in (0, 1]"),
    ],
)
def test_one_sentence_and_exit_code_2(adapted, generate, prompt_file, tiny_model_folder, tmp_path, flags, message):
    names = {"ADAPTER": adapted[0], "BASE": tiny_model_folder, "IN": prompt_file, "OUT": tmp_path / "out.jsonl"}
    code, out, errors = generate(*(names.get(flag, flag) for flag in flags))
    assert code == 2 and out == "" and message in errors
    # Before it there may be a bar of the weights that were loaded.
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2: not valid JSON"),
        ('["a"]', "in.jsonl:2: the row is a list"),
        ('{"prompt": "a", "id": "\\ud83d"}', "in.jsonl:2: the row holds \\ud83d, half of a character"),
        ('{"text": "a"}', 'in.jsonl:2: expected an object with a text under "prompt"'),
        ('{"prompt": ""}', "in.jsonl:2: the prompt has no tokens"),
    ],
)
def test_a_broken_row_is_named_before_anything_is_generated(adapted, generate, tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    code, _, errors = generate("--adapter", adapted[0], "--prompt_file", path, "--output_file", tmp_path / "out.jsonl")
    assert code == 2 and message in errors and [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_line_separators_inside_a_text(adapted, generate, tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert generate("--adapter", adapted[0], "--prompt_file", path, "--output_file", out)[0] == 0
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "a\u2028b"


def test_texts_keep_the_order_of_their_prompts(adapted):
    _, model = adapted
    tokenizer, seen = load_tokenizer(model.adapter_config.base_model_name_or_path), []
    texts = generate_texts(
        model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=4, do_sample=False, on_progress=seen.append
    )
    assert texts == one_by_one(model, tokenizer, PROMPTS, max_new_tokens=4) and seen == [3, 2]


WITHOUT = """
import runpy, sys

def run(script, *argv):
    try:
        sys.argv = [script, *argv]
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        assert left.code == 0, argv

adapter, exported, prompts, out = sys.argv[1:]
run("launch/export.py", "--adapter", adapter, "--output_dir", exported)
model = ["launch/generate.py", "--adapter", exported]
run(*model, "--prompt_file", prompts, "--output_file", out, "--num_beams", "2", "--temperature", "0.7")
run(*model, "--classify", "--prompt", "pay a bill")
try:
    import deepspeed
except ModuleNotFoundError:
    print("no deepspeed")
"""


def test_generate_and_export_need_no_training_stack(adapted, prompt_file, tmp_path):
    adapter, exported, out, script = (tmp_path / name for name in ("adapter", "exported", "out.jsonl", "script.py"))
    shutil.copytree(adapted[0], adapter)
    (adapter / "label_words.json").write_text(json.dumps(["bank", "home", "travel"]))
    script.write_text(WITHOUT)
    result = subprocess.run(
        [sys.executable, "tests/without_training_stack.py", *map(str, (script, adapter, exported, prompt_file, out))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "choose a licence" in result.stdout and "no deepspeed" in result.stdout
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "label_words.json"]
    assert sorted(p.name for p in exported.iterdir()) == names
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(PROMPTS)
    assert {word for _, word in re.findall(r"([\d.]+)%  (\w+)", result.stdout)} == {"bank", "home", "travel"}

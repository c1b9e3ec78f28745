"""What a user can get wrong ends in one clear sentence with the remedy, before any training."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from ldmole_ds.training.arguments import build_parser, parse_flags
from ldmole_ds.training.run import check_best_metric, train
from ldmole_ds.training.runtime import UserError
from ldmole_ds.training.sft import SFTData, token_mean_metrics


@pytest.fixture
def flags(tiny_model_folder, data_folder, tmp_path):
    """A command line that would work, as a dict."""
    return {
        "model_name_or_path": tiny_model_folder,
        "train_file": data_folder / "train.jsonl",
        "validation_file": data_folder / "test.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
    }


def argv(flags: dict) -> list[str]:
    return [str(part) for key, value in flags.items() for part in (f"--{key}", value)]


def write(folder, text: str):
    path = folder / "bad.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_name_or_path": "no/such-model"},
            r"--model_name_or_path 'no/such-model' could not be loaded: .*hub id",
        ),
        ({"model_name_or_path": "missing.gguf"}, r"there is no such GGUF file"),
        ({"train_file": "missing.jsonl"}, r"missing\.jsonl"),
        ({"num_experts": 0}, r"--num_experts must be a whole number of at least 1"),
        ({"lora_dropout": 1.5}, r"--lora_dropout must be in \[0, 1\)"),
        ({"ep_size": "two"}, r"--ep_size must be auto or a whole number"),
        ({"ep_size": 2}, r"--ep_size 2 does not divide the 1 ranks"),
        ({"target_modules": "qq_proj"}, r"target_modules \['qq_proj'\] match no linear layer .*'q_proj'.*'all-linear'"),
        ({"target_modules": "nothing.*"}, r"matches no linear layer .*choose among"),
        ({"deepspeed": "ds_configs/zero9.json"}, r"--deepspeed ds_configs/zero9\.json does not exist"),
        ({"eval_strategy": "steps", "validation_file": ""}, r"--eval_strategy|validation_file"),
        ({"max_train_samples": 0}, r"--max_train_samples must be at least 1"),
        ({"label_words": "missing.json"}, r"--label_words missing\.json"),
        ({"router": "topk", "topk": 9}, r"topk=9 is more than num_experts=8"),
        ({"max_length": 1}, r"max_length"),
        ({"validation_split": "0.1"}, r"--validation_split 0\.1 is for --dataset_name and --task.*--validation_file"),
        ({"dataset_name": "some/set"}, r"--train_file is for rows in files and --dataset_name for those of the hub"),
        ({"optim": "galore_adamw"}, r"--optim galore_adamw cannot be used: .*galore_torch"),
        ({"adam_beta1": 2}, r"--optim adamw_torch_fused cannot be used: Invalid beta"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            r"--lr_scheduler_type warm.*num_decay_steps.*--lr_sched",
        ),
        (
            {"metric_for_best_model": "eval_accuraccy", "eval_strategy": "steps", "eval_steps": 1},
            r"--metric_for_best_model eval_accuraccy is not one of loss, accuracy, accuracy_stderr$",
        ),
        ({"report_to": "dvclive"}, r"DVCLiveCallback requires dvclive"),
        ({"train_sampling_strategy": "batch_rebalance"}, r"batch_rebalance is not supported"),
        ({"use_liger_kernel": True}, r"liger-kernel"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
            r"12 training rows fill no batch",
        ),
        ({"activation_checkpointing_kwargs": '{"use_reentrant": true}'}, r"reentrant.*pass use_reentrant=False"),
    ],
)
def test_one_sentence_with_the_remedy(flags, change, message):
    with pytest.raises(UserError, match=message) as caught:
        train(parse_flags(argv({**flags, **change})))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b"}\n', r"bad\.jsonl:2: no key 'label'"),
        ('{"text": "a", "label": "x"}\nnot json\n', r"bad\.jsonl:2"),
        ("", r"bad\.jsonl"),
        (
            '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}\n',
            r":1: answerKey",
        ),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(flags, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        train(parse_flags(argv({**flags, "train_file": write(tmp_path, rows)})))


@pytest.mark.parametrize("part", ["train_file", "validation_file"])
def test_a_question_longer_than_the_model_can_read_is_refused(flags, tmp_path, part):
    rows = [
        {"text": "pay " * 3000, "label": "bank"},
        {"text": "go", "label": "travel"},
        {"text": "lamp", "label": "home"},
    ]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"a question has \d+ tokens, but the model has 2048 .*use --max_length 2048"):
        train(parse_flags(argv({**flags, part: path, "max_length": 100000})))


def test_a_resume_that_is_refused_leaves_the_runs_settings(flags):
    flags |= {"save_strategy": "steps", "save_steps": 1, "batch_size_warmup_start": 2, "batch_size_warmup_steps": 1}
    flags |= {"gradient_accumulation_steps": 2, "lambda_hidden_size": 8}
    train(parse_flags(argv(flags)))
    settings = flags["output_dir"] / "run_settings.json"
    before = settings.read_text()
    assert json.loads(before)["batch"]["batch_size_warmup_steps"] == 1
    resumed = {**flags, "resume": "auto", "batch_size_warmup_steps": 2, "max_steps": 3}
    with pytest.raises(UserError, match="was saved with --global_batch_size 4 .*--batch_size_warmup_steps 1, this run"):
        train(parse_flags(argv(resumed)))
    with pytest.raises(UserError, match="this run wants"):
        train(parse_flags(argv({**resumed, "batch_size_warmup_steps": 1, "r": 4})))
    assert settings.read_text() == before


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ],
)
def test_unsupported_deepspeed_settings_are_refused(flags, tmp_path, setting, name):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(setting))
    with pytest.raises(UserError, match=f"{name} is not supported yet"):
        train(parse_flags(argv({**flags, "deepspeed": path})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"zero_optimization": true}', "zero_optimization must be a JSON object of its settings, got True"),
        (b'{"bf16": true}', "bf16 must be a JSON object"),
        (b'{"zero_optimization": {"offload_param": "cpu"}}', r"zero_optimization\.offload_param must be a JSON object"),
        (b'{"a": "\xff"}', r"--deepspeed .*ds\.json is not valid JSON"),
    ],
)
def test_a_deepspeed_config_of_the_wrong_form_is_named(flags, tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        train(parse_flags(argv({**flags, "deepspeed": path})))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_an_engine_in_half_precision_is_asked_for_twice(flags, name):
    flags = {**flags, "deepspeed": f"ds_configs/zero2_{name}.json", "adapter_dtype": "float32"}
    with pytest.raises(UserError, match=rf"zero2_{name}\.json enables {name}: add --{name}, or, .*--dtype bfloat16"):
        train(parse_flags(argv(flags)))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("model_name_or_path", "", "--model_name_or_path is empty: give a value, or leave it out"),
        ("deepspeed", "", "--deepspeed is empty"),
        ("adapter_name_or_path", "", "--adapter_name_or_path is empty"),
        ("learning_rate", "nan", "--learning_rate must be a finite number, got nan"),
        ("learning_rate", "inf", "--learning_rate must be a finite number, got inf"),
        ("max_grad_norm", "nan", "--max_grad_norm must be a finite number"),
        ("weight_decay", "-0.1", "--weight_decay must be 0 or more, got -0.1"),
        ("label_smoothing_factor", "1", "--label_smoothing_factor must be below 1"),
        ("per_device_train_batch_size", "0", "--per_device_train_batch_size must be a whole number of at least 1"),
        ("per_device_eval_batch_size", "0", "--per_device_eval_batch_size must be a whole number of at least 1"),
        ("gradient_accumulation_steps", "-2", "--gradient_accumulation_steps must be a whole number of at least 1"),
    ],
)
def test_values_that_no_run_can_want_are_refused_while_flags_are_read(flag, value, message):
    with pytest.raises(UserError, match=message):
        parse_flags([f"--{flag}={value}"])
    parse_flags(["--run_name=", "--max_grad_norm=inf", "--learning_rate=0"])


def test_unknown_flags_and_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown argument --lora_rank 8"):
        parse_flags(["--lora_rank", "8"])
    path = tmp_path / "run.yaml"
    path.write_text("lora_alhpa: 8\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown setting 'lora_alhpa': did you mean lora_alpha"):
        parse_flags([str(path)])
    path.write_text("1: 2\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown setting 1: see --help_all"):
        parse_flags([str(path)])
    path.write_bytes(b"r: \xff\n")
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML or JSON"):
        parse_flags([str(path)])
    with pytest.raises(UserError, match="invalid choice: 'soft'"):
        parse_flags(["--router", "soft"])


def test_a_settings_file_is_overridden_by_flags(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"r": 4, "num_experts": 16, "target_modules": ["q_proj", "v_proj"], "bf16": True}))
    flags = parse_flags([str(path), "--r", "32"], {"num_experts": 2, "output_dir": "runs/demo"})
    assert (flags.r, flags.num_experts, flags.target_modules, flags.bf16) == (32, 16, ["q_proj", "v_proj"], True)
    path.write_text("lora_r: 4\n")
    assert parse_flags([str(path)]).r == 4


def test_help_is_grouped_and_shows_defaults():
    text = build_parser().format_help()
    for group in ("base model:", "data:", "adapter:", "expert parallelism and output:"):
        assert group in text
    assert "--num_experts" in text and "(default: 8)" in text
    assert len(text.splitlines()) < 260
    assert "--torch_compile_mode" not in text and "--torch_compile_mode" in build_parser(all_flags=True).format_help()


@pytest.mark.parametrize(
    ("name", "known"), [("perplexity", True), ("eval_loss", True), (None, True), ("accuracy", False)]
)
def test_metrics_of_held_out_documents(name, known):
    one = SimpleNamespace(predictions=np.ones((1, 1)), label_ids=np.ones((1, 1)))
    assert tuple(token_mean_metrics(one)) == SFTData.metric_names
    training = SimpleNamespace(metric_for_best_model=name)
    data = SimpleNamespace(metric_names=SFTData.metric_names, validation=[0])
    with nullcontext() if known else pytest.raises(ValueError, match="accuracy is not one of loss, perplexity"):
        check_best_metric(training, data)

"""The methods by name, what a sweep varies, and what of a command line is refused."""

import dataclasses
import re
from pathlib import Path

import pytest

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.compare.arguments import parse_compare_flags
from ldmole_ds.compare.methods import METHODS, SWEEPS, methods_of, sweep_of, with_equal_parameters
from ldmole_ds.training.runtime import UserError
from tests.tiny import tiny_llama

BASE = ["--model_name_or_path", "unused", "--methods", "ld-mole"]


def trainable(config):
    return get_ldmole_model(tiny_llama(), config).num_parameters_by_kind()["trainable"]


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_settings_are_those_of_the_adapter(method):
    assert dataclasses.replace(LDMoLEConfig(), **method.settings)


def test_plain_lora_comes_first():
    assert [m.name for m in methods_of("ld-mole, softmax")] == ["lora", "ld-mole", "softmax"]
    assert [m.name for m in methods_of("ld-mole,lora")] == ["lora", "ld-mole"]


def test_equal_parameters_are_nearest_on_the_model():
    common = LDMoLEConfig(num_experts=4, r=4, lora_alpha=8, lambda_hidden_size=16)
    method = with_equal_parameters(METHODS["lora-params"], common, tiny_llama().config)
    rank, wanted = method.settings["r"], trainable(common)
    distance = {
        r: abs(trainable(dataclasses.replace(common, router="lora", r=r)) - wanted) for r in (rank - 1, rank, rank + 1)
    }
    assert min(distance, key=distance.get) == rank > 16  # experts and routers
    assert method.settings["lora_alpha"] / rank == common.scaling and method.label.endswith(f"(r {rank})")


def test_a_sweep_keeps_what_it_does_not_vary():
    variants = sweep_of("r", None, METHODS["ld-mole-paper"], LDMoLEConfig())
    assert [v.name for v in variants] == ["r=2", "r=4", "r=8", "r=16"]
    assert variants[0].settings == {"lambda_init": "paper", "r": 2, "lora_alpha": 4.0}
    weights = sweep_of("sparsity_loss_weight", "0,0.25", METHODS["ld-mole"], LDMoLEConfig())
    assert [v.settings for v in weights] == [{"sparsity_loss_weight": 0.0}, {"sparsity_loss_weight": 0.25}]


@pytest.mark.parametrize("setting", SWEEPS)
def test_the_presets_of_sweeps_are_valid(setting):
    for variant in sweep_of(setting, None, METHODS["ld-mole"], LDMoLEConfig()):
        assert dataclasses.replace(LDMoLEConfig(), **variant.settings)


def test_the_document_names_all_methods_and_sweeps():
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    methods, sweeps = text.split("## Methods")[1].split("## Sweeps")
    named = [n for row in re.findall(r"^\| (`.*?) \|", methods, re.MULTILINE)[1:] for n in re.findall(r"`(.+?)`", row)]
    assert sorted(named) == sorted(METHODS)
    rows = re.findall(r"^\| `(\w+)`[^|]* \| ([\d., ]+) \|", sweeps, re.MULTILINE)
    assert {name: tuple(map(float, values.split(", "))) for name, values in rows} == SWEEPS


def test_flags_of_training_reach_every_run(tmp_path):
    argv = [*BASE, "--seeds", "3,1", "--learning_rates", "1e-3", "--r", "4", "--bf16", "--output_dir", str(tmp_path)]
    own, plan = parse_compare_flags(argv)
    assert plan.flags == {"model_name_or_path": "unused", "r": 4, "bf16": True, "max_steps": 100}
    assert (plan.seeds, plan.learning_rates, plan.selects) == ((3, 1), (0.001,), False)
    assert [m.name for m in plan.methods] == ["lora", "ld-mole"]
    command = " ".join(plan.train(plan.tasks[0], plan.methods[0], 1e-3, 3, select=False).command)
    for part in (
        "--lora_r 4",
        "--bf16 True",
        "--router lora",
        "--seed 3",
        "--max_steps 100",
        "--validation_split test",
    ):
        assert part in command


def test_epochs_instead_of_steps():
    _, plan = parse_compare_flags([*BASE, "--num_train_epochs", "2"])
    assert plan.flags["num_train_epochs"] == 2 and "max_steps" not in plan.flags


def test_rates_are_never_chosen_on_reported_rows():
    _, plan = parse_compare_flags([*BASE, "--task", "arc_easy,cola", "--selection_rows", "50"])
    arc, cola = plan.tasks
    assert plan.splits(arc) == ("train", "validation") and arc.heldout_split == "test"
    assert plan.splits(cola) == ("train[:-50]", "train[-50:]") and cola.heldout_split == "validation"
    cell = plan.train(cola, plan.methods[0], 1e-3, 1, select=False)
    assert (cell.settings["train_split"], cell.settings["validation_split"]) == ("train[:-50]", "validation")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lora,ld-mol"], "'ld-mol' is not known: did you mean ld-mole"),
        (["--methods", "lora,lora"], "names lora twice"),
        (["--methods", " , "], "--methods is empty"),
        (["--task", "arc_eazy"], "did you mean arc_easy"),
        (["--task", ""], "--task '' is not known"),
        (["--seeds", ""], "--seeds '': give one or several"),
        (["--seeds", "1,one"], "--seeds '1,one': give numbers"),
        (["--seeds", "1,1"], "different numbers"),
        (["--learning_rates", "0"], "above 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1"),
        (["--parallel", "0"], "--parallel must be at least 1"),
        (["--learning_rate", "1e-3"], "give --learning_rates"),
        (["--router", "topk"], "give --methods"),
        (["--train_file", "x.jsonl"], "give --task"),
        (["--token", "secret"], "HF_TOKEN"),
        (["--sweep", "rank"], "invalid choice"),
        (["--sweep", "target_num_experts"], "add --sparsity_loss_weight 1"),
        (["--sweep_values", "1"], "--sweep_values is for --sweep"),
        (["--sweep", "r", "--sweep_values", "1.5"], "r takes whole numbers"),
        (["--sweep", "r", "--sweep_values", "2,2"], "different values of r"),
        (["--sweep", "r", "--sweep_values", "0"], "method r=0: r must be a whole number of at least 1"),
        (["--sweep", "r", "--methods", "ld-mole,softmax"], "--sweep varies one method"),
        (["--parallel", "2", "--launcher", "deepspeed --num_gpus 2"], "--master_port {port}"),
        (["--no_such_flag", "1"], "unknown argument --no_such_flag"),
        (["--lora_dropout", "2"], "lora_dropout must be in"),
    ],
)
def test_bad_flags_end_in_a_sentence(flags, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")):
        parse_compare_flags([*BASE, *flags])

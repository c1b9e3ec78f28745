"""Presets on the command line: defaults that any flag overrides."""

import pytest

from ldmole_ds.config import PRESETS
from ldmole_ds.training.arguments import adapter_config, parse_flags
from ldmole_ds.training.runtime import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_command_line(name):
    config = adapter_config(parse_flags(["--preset", name, "--output_dir", "out"]))
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_flags_override_a_preset_and_a_preset_the_defaults():
    flags = parse_flags(["--preset", "sparse", "--target_num_experts", "3"], {"sparsity_loss_weight": 9.0})
    assert (flags.target_num_experts, flags.sparsity_loss_weight) == (3, 1.0)


def test_a_preset_in_a_settings_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: llama-3.2-3b\nr: 4\n")
    config = adapter_config(parse_flags([str(path), "--r", "16"]))
    assert (config.lambda_hidden_size, config.r) == (512, 16)


def test_an_unknown_preset():
    with pytest.raises(UserError, match="--preset large is not known: use one of qwen3-1.7b"):
        parse_flags(["--preset", "large"])


def test_expert_counts_of_layers_as_flags():
    config = adapter_config(parse_flags(["--router", "topk", "--experts_per_layer", "2", "4"]))
    assert config.experts_per_layer == [2, 4] and config.num_experts == 4

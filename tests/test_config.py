"""The adapter's configuration: defaults, what is refused and why, and its way to disk and back."""

import dataclasses
import json

import pytest

from ldmole_ds.config import BALANCE_STATISTICS, CONFIG_NAME, LDMoLEConfig
from ldmole_ds.layers.routers import ROUTERS, build_router

NAN, INF = float("nan"), float("inf")


def test_the_defaults_are_the_papers():
    config = LDMoLEConfig()
    values = (config.num_experts, config.r, config.lora_alpha, config.lora_dropout, config.target_modules)
    assert values == (8, 8, 16, 0.1, "all-linear")
    weights = (config.load_balancing_loss_weight, config.sparsity_loss_weight, config.router_z_loss_weight)
    assert weights == (1.0, 0.0, 0.0)
    assert config.scaling == 2.0 and config.router == "sparsegen" and config.target_num_experts == 2


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(
            (field, bad)
            for field in ("num_experts", "r", "lambda_hidden_size", "topk")
            for bad in (0, -1, 2.0, "8", True)
        ),
        ("target_num_experts", 0),
        *(("lora_dropout", bad) for bad in (-0.1, 1.0, NAN, "0.1", None)),
        *(("lora_alpha", bad) for bad in (0, -1, NAN, INF, "16")),
        *(("fixed_lambda", bad) for bad in (1.0, 2, NAN, -INF)),
        *(("sparsity_loss_weight", bad) for bad in (-1, NAN, INF, "0")),
        ("load_balancing_loss_weight", -0.5),
        ("router_z_loss_weight", INF),
        ("lambda_sharing", "global"),
        ("lambda_init", "dead"),
        ("balance_statistics", "local"),
        ("input_groups", "none"),
        ("adapter_dtype", "float64"),
        ("target_modules", []),
        ("target_modules", ""),
    ],
)
def test_a_bad_value_is_refused_by_name(field, bad):
    with pytest.raises(ValueError, match=f"^{field}") as caught:
        LDMoLEConfig(**{field: bad})
    if bad not in ("", []):
        assert repr(bad) in str(caught.value), "the message must quote the value"


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": 1, "r": 1, "lora_dropout": 0.0, "lora_alpha": 0.5},
        {"lora_dropout": 0, "fixed_lambda": -100, "load_balancing_loss_weight": 0},
        {"router": "topk", "topk": 8},
        {"target_num_experts": 9},  # no penalty, but no error either
        {"adapter_dtype": "bfloat16", "target_modules": ["q_proj"]},
        *({"router": name} for name in ROUTERS),
        *({"balance_statistics": name} for name in BALANCE_STATISTICS),
    ],
)
def test_the_edges_of_what_is_allowed(values):
    config = LDMoLEConfig(**values)
    assert all(getattr(config, key) == value for key, value in values.items())


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ValueError, match="router='switch' is not known: use one of sparsegen, .*, lora"):
        build_router("switch")


def test_topk_cannot_exceed_the_experts():
    with pytest.raises(ValueError, match="topk=9 is more than num_experts=8: lower topk"):
        LDMoLEConfig(router="topk", topk=9)
    assert LDMoLEConfig(router="sparsegen", topk=9).topk == 9, "other routers do not read it"


def test_plain_lora_is_one_expert():
    assert LDMoLEConfig(router="lora", num_experts=8).num_experts == 1


def test_sets_become_sorted_lists():
    assert LDMoLEConfig(target_modules={"v_proj", "q_proj"}).target_modules == ["q_proj", "v_proj"]


def test_every_field_has_a_help_text():
    for field in dataclasses.fields(LDMoLEConfig):
        assert field.metadata.get("help"), field.name


def test_round_trip_through_json(tmp_path):
    config = LDMoLEConfig(
        num_experts=4,
        lora_alpha=1.5,
        target_modules=["q_proj", "k_proj"],
        router="topk",
        modules_to_save=["lm_head"],
        base_model_name_or_path="base",
        projection_groups=[["a.q_proj", "a.k_proj"], ["a.o_proj"]],
    )
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config.to_dict()))
    assert LDMoLEConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["peft_type"] == "LD_MOLE"


def test_an_unknown_setting_is_not_dropped():
    with pytest.raises(ValueError, match=r"unknown adapter settings \['rank'\].*upgrade, or remove"):
        LDMoLEConfig.from_dict({"peft_type": "LD_MOLE", "rank": 8})


def test_the_layout_is_not_part_of_the_adapter():
    assert not {"ep_size", "expert_dispatch"} & set(LDMoLEConfig().to_dict())

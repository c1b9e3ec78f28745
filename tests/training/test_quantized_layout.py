"""What the Trainer says of a quantised base in a layout that does not suit it."""

import logging
from types import SimpleNamespace

import pytest

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.training.trainer import LDMoLETrainer
from tests.quantized_models import quantized_llama
from tests.tiny import tiny_config, tiny_llama


@pytest.mark.parametrize(("quantized", "stage", "warns"), [(True, 3, True), (True, 2, False), (False, 3, False)])
def test_zero_3_is_advised_against(monkeypatch, caplog, quantized, stage, warns):
    monkeypatch.setattr(LDMoLETrainer, "_zero_stage", stage)
    trainer = object.__new__(LDMoLETrainer)
    trainer.args = SimpleNamespace(average_tokens_across_devices=True, should_log=True)
    model = get_ldmole_model(quantized_llama("nf4") if quantized else tiny_llama(), tiny_config())
    with caplog.at_level(logging.WARNING):
        trainer._check_layout(model)
    assert ("saves no memory on a quantised base" in caplog.text) == warns

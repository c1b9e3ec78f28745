"""What the Trainer says of a quantised base in a layout that does not suit it."""

import logging

import pytest
from transformers import TrainingArguments

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.training.checks import check_trainable
from tests.quantized_models import quantized_llama
from tests.tiny import tiny_config, tiny_llama


@pytest.mark.parametrize(("quantized", "stage", "warns"), [(True, 3, True), (True, 2, False), (False, 3, False)])
def test_zero_3_is_advised_against(tmp_path, caplog, quantized, stage, warns):
    model = get_ldmole_model(quantized_llama("nf4") if quantized else tiny_llama(), tiny_config())
    with caplog.at_level(logging.WARNING):
        check_trainable(model, TrainingArguments(output_dir=tmp_path, use_cpu=True), stage)
    assert ("saves no memory on a quantised base" in caplog.text) == warns

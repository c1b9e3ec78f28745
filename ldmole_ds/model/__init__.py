"""Wrapping a Hugging Face model with experts; saving and loading the adapter."""

from ldmole_ds.model.inject import get_ldmole_model
from ldmole_ds.model.ldmole_model import LDMoLEModel
from ldmole_ds.model.param_groups import ldmole_param_groups

__all__ = ["LDMoLEModel", "get_ldmole_model", "ldmole_param_groups"]

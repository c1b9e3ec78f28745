"""Modules that hold the adapter's parameters: lambda MLP, input groups with router and experts, adapted linears."""

from ldmole_ds.layers.adapted_linear import AdaptedLinear
from ldmole_ds.layers.context import ForwardContext, RoutingRecord
from ldmole_ds.layers.input_group import InputGroup
from ldmole_ds.layers.lambda_mlp import LambdaMLP
from ldmole_ds.layers.routers import build_router

__all__ = ["AdaptedLinear", "ForwardContext", "InputGroup", "LambdaMLP", "RoutingRecord", "build_router"]

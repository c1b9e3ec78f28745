"""Plan before paying: parameters, memory, bytes and time of a run in every layout, from a configuration alone."""

from ldmole_ds.planner.cluster import PRESETS, Cluster, Device, Wire, read_calibration, write_calibration
from ldmole_ds.planner.costs import StepCosts
from ldmole_ds.planner.estimate import Estimate, Job, layouts, recommend
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape, load_config, shape_of, shape_of_config
from ldmole_ds.planner.report import launch_command, plan_dict, plan_text
from ldmole_ds.planner.step_kind import StepKind, kind_of
from ldmole_ds.planner.trace import StepTrace, trace_step

__all__ = [
    "PRESETS",
    "Batch",
    "Cluster",
    "Device",
    "Estimate",
    "Job",
    "Layout",
    "ModelShape",
    "Precision",
    "Routing",
    "StepCosts",
    "StepKind",
    "StepTrace",
    "Wire",
    "kind_of",
    "launch_command",
    "layouts",
    "load_config",
    "plan_dict",
    "plan_text",
    "read_calibration",
    "recommend",
    "shape_of",
    "shape_of_config",
    "trace_step",
    "write_calibration",
]

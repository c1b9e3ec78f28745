"""DeepSpeed's private names stand in one file, and a missing one is a clear error at its first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from ldmole_ds.distributed import deepspeed_engine, deepspeed_groups, deepspeed_private, zero
from ldmole_ds.training import runtime

PACKAGE = Path(__file__).resolve().parents[2] / "ldmole_ds"
HOME = "distributed/deepspeed_private.py"
# Private names that are not DeepSpeed's. Every user of ZeRO-3 reads ds_id, Transformers too.
OTHERS = {
    "python, argparse": {"__dict__", "__module__", "__name__", "__traceback__", "_actions", "_exit"},
    "torch": {"_C", "_ConvNd", "_current_graph_task_id", "_modules", "_set_pg_timeout", "_version", "_world"},
    "torch, a group's timeout": {"_get_backend", "_timeout"},
    "torch, tracing": {"_TorchDispatchModeKey", "_get_dispatch_mode", "_len_torch_dispatch_stack"},
    "torch, tensors and hooks": {"_forward_hooks", "_global_forward_hooks", "_is_view"},
    "torch, operations by name": {
        "_linear_pointwise",
        "_local_scalar_dense",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_schema",
        "_unsafe_view",
    },
    "transformers, datasets": {"_commit_hash", "_fingerprint"},
    "deepspeed": {"ds_id"},
}


def names_used(tree: ast.AST) -> set[str]:
    """Attributes that start with an underscore or ``ds_``, getattr's and hasattr's too; of others than self."""
    own = {"self", "super()"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) not in own}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    looks = [call for call in calls if getattr(call.func, "id", "") in ("getattr", "hasattr", "setattr")]
    used |= {arg.value for call in looks for arg in call.args if isinstance(arg, ast.Constant)}
    return {name for name in used if isinstance(name, str) and name.startswith(("_", "ds_"))}


def names_defined(tree: ast.AST) -> set[str]:
    """Functions, classes, and attributes that are set."""
    nodes = list(ast.walk(tree))
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return stored | {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_private_names_are_read_through_one_file():
    trees = {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}
    known = set().union(*OTHERS.values(), *map(names_defined, trees.values()))
    assert HOME in trees
    found = {file: names_used(tree) - known for file, tree in trees.items() if file != HOME}
    assert {file: names for file, names in found.items() if names} == {}, f"look them up with `private` of {HOME}"


def test_a_planted_private_name_is_found():
    tree = ast.parse(
        "groups._get_group()\ngetattr(param, 'ds_shape')\nx._own = x.public\nself._z\nx._own\nprivate(x, '_y')"
    )
    assert names_used(tree) - names_defined(tree) == {"_get_group", "ds_shape"}


def expert_groups(monkeypatch, name):
    monkeypatch.delattr(f"deepspeed.utils.groups.{name}")
    deepspeed_private.create_expert_groups(1)


def param_groups(monkeypatch, name):
    monkeypatch.delattr(f"deepspeed.moe.utils.{name}")
    deepspeed_groups.split_expert_param_groups([])


def shared_memory_op(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ModuleType("deepspeed.ops"))
    deepspeed_private.skip_shared_memory_op()


def engine_hook(monkeypatch, name):
    monkeypatch.setattr("deepspeed.runtime.engine.DeepSpeedEngine", type("DeepSpeedEngine", (), {}))
    deepspeed_engine.prepare_engines()


def placement(monkeypatch, name):
    monkeypatch.delattr(f"deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.{name}")
    model = nn.Linear(2, 2)
    deepspeed_groups.mark_expert_parameter(model.weight, "ep_size_2", None)
    monkeypatch.setattr(deepspeed_engine, "create_expert_groups", lambda ep_size: None)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 3, zero_offload_param=lambda: None)
    deepspeed_engine._prepare_model(model, engine)


def marker(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "deepspeed.moe.layer", None)
    deepspeed_engine._moe_marker(2)


def init_context(monkeypatch, name):
    monkeypatch.delattr(f"deepspeed.runtime.zero.partition_parameters.{name}")
    with zero.outside_partitioned_init():
        pass


def in_flight(monkeypatch, name):
    model = nn.Linear(2, 2)
    model.ds_id = 0  # as stage 3 leaves it
    zero.finish_prefetches(model)


def shape(monkeypatch, name):
    param = nn.Parameter(torch.zeros(2))
    param.ds_id = 0
    zero.full_shape(param)


CASES = [
    (expert_groups, "_get_expert_parallel_group_dict"),
    (expert_groups, "_create_expert_and_data_parallel"),
    (expert_groups, "_get_expert_parallel_group"),
    (expert_groups, "_get_expert_data_parallel_group"),
    (param_groups, "split_params_into_different_moe_groups_for_optimizer"),
    (shared_memory_op, "__compatible_ops__"),
    (engine_hook, "_configure_distributed_model"),
    (placement, "_autoep_expert_parallel_group"),
    (marker, "MoE"),
    (init_context, "shutdown_init_context"),
    (init_context, "restore_init_context"),
    (in_flight, "ds_inflight_param_registry"),
    (shape, "ds_shape"),
]


@pytest.mark.parametrize(("use", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_missing_name_is_a_clear_error(use, name, monkeypatch):
    import deepspeed  # noqa: F401  what is deleted must be there

    with pytest.raises(
        RuntimeError, match=rf"this DeepSpeed has no {name} .*tested with.*'deepspeed>=0\.19\.3,<0\.20'"
    ):
        use(monkeypatch, name)


def test_a_missing_deepspeed_is_the_same_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", None)
    with pytest.raises(RuntimeError, match="pip install 'deepspeed"):
        deepspeed_private.create_expert_groups(1)


MUON = """
import sys, deepspeed, torch
from ldmole_ds.distributed.deepspeed_private import defer_muon_compile
asked = []
def compile(kernel):
    asked.append(kernel.__name__)
    return kernel
torch.compile = compile
kept = deepspeed.runtime.compiler.compile
defer_muon_compile()
assert deepspeed.runtime.compiler.compile is kept
muon = sys.modules["deepspeed.runtime.zero.muon.original_muon"]
assert not asked and "torch._inductor.compile_fx" not in sys.modules
for _ in range(2):
    assert muon.zeropower_via_newtonschulz5(torch.eye(2), 1).shape == (2, 2)
assert asked == ["zeropower_via_newtonschulz5"], asked
"""


def test_muon_kernels_are_compiled_when_they_run_first_and_once():
    done = subprocess.run([sys.executable, "-c", MUON], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_deepspeed_without_muon_starts_as_well(monkeypatch):
    for name in ("deepspeed.runtime.compiler", "deepspeed.runtime.zero.muon.muon_optimizer"):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, name, None)
            deepspeed_private.defer_muon_compile()


@pytest.mark.parametrize("name", ["_world", "_set_pg_timeout"])
def test_a_torch_without_group_timeouts_is_a_clear_error(name, monkeypatch):
    monkeypatch.delattr(torch.distributed.distributed_c10d, name)
    with pytest.raises(RuntimeError, match=rf"timeouts of process groups: this torch has changed \(.*{name}"):
        runtime.limit_group_timeouts(5)

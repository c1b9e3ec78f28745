"""Imports in the package go one way, and DeepSpeed and Transformers stay in the files that are theirs.

Every import statement counts: inside functions, under ``TYPE_CHECKING``, and ``import_module`` with a literal name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "ldmole_ds"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# What each area may import besides itself. `import ldmole_ds` itself is refused in all of them: it is the public API,
# which imports from everywhere.
_LOWER = ["config", "ops", "distributed", "checkpoint", "layers", "model"]
MAY_IMPORT = {area: set(_LOWER[:i]) for i, area in enumerate(_LOWER)}
MAY_IMPORT["tasks"] = set(_LOWER)
MAY_IMPORT["training"] = {*_LOWER, "tasks"}
MAY_IMPORT["analysis"] = {*_LOWER, "tasks"}
MAY_IMPORT["parity"] = set(_LOWER)
MAY_IMPORT["planner"] = set(_LOWER)
MAY_IMPORT["doctor"] = set(_LOWER)
MAY_IMPORT["compare"] = {*_LOWER, "tasks", "training", "planner"}

# Where a framework may be imported: a file, or a folder with its trailing slash.
FRAMEWORK_HOMES = {
    "deepspeed": (
        "distributed/deepspeed_engine.py",
        "distributed/deepspeed_groups.py",
        "distributed/deepspeed_private.py",
        "distributed/zero.py",
        "training/",
        "parity/engine.py",
        "planner/calibrate_steps.py",
    ),
    "transformers": ("model/", "tasks/", "training/", "analysis/", "parity/model.py", "planner/"),
}
OUTSIDE = ("launch", "tests")


def find_violations(root: Path) -> list[str]:
    return [f"{path.relative_to(root)}:{line}: {problem}" for path, line, problem in _walk(root)]


def _walk(root: Path) -> Iterator[tuple[Path, int, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        area = relative.parts[0].removesuffix(".py")
        if area != "__init__" and area not in MAY_IMPORT:
            yield path, 1, f"{area} has no place in the order of imports"
            continue
        for line, module in _imports(path, root):
            problem = _judge(relative.as_posix(), area, module)
            if problem:
                yield path, line, problem


def _judge(relative: str, area: str, module: str) -> str | None:
    top, _, rest = module.partition(".")
    if top in OUTSIDE:
        return f"imports {module}, which is not part of the package"
    if top in FRAMEWORK_HOMES and not _is_home(relative, FRAMEWORK_HOMES[top]):
        return f"imports {top} outside of {', '.join(FRAMEWORK_HOMES[top])}"
    if top != PACKAGE or area == "__init__":
        return None
    target = rest.partition(".")[0]
    if target not in MAY_IMPORT:
        return f"imports from {PACKAGE} itself; name the module that defines it"
    if target != area and target not in MAY_IMPORT[area]:
        return f"{area} imports {target}, against the order"
    return None


def _is_home(relative: str, homes: tuple[str, ...]) -> bool:
    return any(relative.startswith(home) if home.endswith("/") else relative == home for home in homes)


def _imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields line and absolute dotted name of everything the file imports."""
    folder = [PACKAGE, *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            for alias in node.names:
                # In `from package import name` the name may be a module.
                yield node.lineno, ".".join(filter(None, [*base, node.module, alias.name]))
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            name = node.args[0].value
            yield node.lineno, f"{PACKAGE}.{name.lstrip('.')}" if name.startswith(".") else name


def _is_dynamic_import(call: ast.Call) -> bool:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if function not in ("import_module", "__import__") or not call.args:
        return False
    return isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)


def test_package_follows_the_order():
    assert any(ROOT.rglob("*.py"))
    assert find_violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("config.py", "from ldmole_ds.ops import sparsegen", "config imports ops"),
        ("ops/losses.py", "import ldmole_ds.distributed.groups", "ops imports distributed"),
        ("ops/losses.py", "from ..layers.router import Router", "ops imports layers"),
        ("ops/losses.py", "from .. import layers", "ops imports layers"),
        ("ops/kernels/fused.py", "from ...layers import router", "ops imports layers"),
        ("distributed/zero.py", "def f():\n    from ldmole_ds import layers", "distributed imports layers"),
        ("layers/router.py", "if TYPE_CHECKING:\n    from ldmole_ds.model.wrap import Model", "layers imports model"),
        ("model/wrap.py", "from ldmole_ds.training.trainer import T", "model imports training"),
        ("tasks/schema.py", "import ldmole_ds.training", "tasks imports training"),
        ("tasks/schema.py", "from ldmole_ds.analysis import report", "tasks imports analysis"),
        ("training/trainer.py", "from ldmole_ds.analysis import report", "training imports analysis"),
        ("analysis/report.py", "from ldmole_ds.training import trainer", "analysis imports training"),
        ("layers/router.py", "from ldmole_ds import LDMoLEConfig", "imports from ldmole_ds itself"),
        ("layers/router.py", "import ldmole_ds", "imports from ldmole_ds itself"),
        ("training/trainer.py", "from launch import train", "not part of the package"),
        ("__init__.py", "import tests.conftest", "not part of the package"),
        ("layers/router.py", "def f():\n    import deepspeed.comm as dist", "imports deepspeed outside"),
        ("layers/router.py", "import importlib\nimportlib.import_module('deepspeed')", "imports deepspeed outside"),
        ("distributed/dispatch.py", "from deepspeed.utils import groups", "imports deepspeed outside"),
        ("distributed/zero.py", "import transformers", "imports transformers outside"),
        ("__init__.py", "import transformers", "imports transformers outside"),
        ("helpers/misc.py", "", "helpers has no place"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, problem):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    violations = find_violations(tmp_path)
    assert len(violations) == 1
    assert violations[0].startswith(f"{file}:{source.count(chr(10)) + 1}:")
    assert problem in violations[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from ldmole_ds.config import LDMoLEConfig\nfrom .training import trainer"),
        ("ops/losses.py", "import torch\nfrom ldmole_ds.ops.sparsegen import sparsegen\nfrom . import sparsegen"),
        ("layers/router.py", "from ldmole_ds import config, ops\nfrom ..ops.sparsegen import sparsegen"),
        ("distributed/zero.py", "def f():\n    import deepspeed"),
        ("distributed/deepspeed_groups.py", "from deepspeed.utils import groups"),
        ("training/callbacks/resume.py", "import deepspeed\nimport transformers\nfrom ldmole_ds.tasks import schema"),
        ("analysis/report.py", "import transformers\nfrom ldmole_ds.tasks import schema"),
    ],
)
def test_an_allowed_import_passes(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert find_violations(tmp_path) == []

"""Run a program as where the training stack is not installed: `python tests/without_training_stack.py FILE ARGS`.

Those packages can be neither found nor imported, and their metadata is not there either.
"""

import runpy
import sys

ABSENT = frozenset({"deepspeed", "accelerate", "datasets", "mpi4py", "matplotlib", "peft", "trl", "bitsandbytes"})


class OtherPackages:
    """All finders there were, but for the absent packages."""

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, *args, **kwargs):
        for finder in self.finders:
            found = finder.find_distributions(*args, **kwargs) if hasattr(finder, "find_distributions") else ()
            yield from (d for d in found if d.name not in ABSENT)


if __name__ == "__main__":
    sys.meta_path[:] = [OtherPackages(list(sys.meta_path))]
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        assert not ABSENT & set(sys.modules), "an absent package was imported"

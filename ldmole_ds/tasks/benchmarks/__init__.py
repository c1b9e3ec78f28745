"""The nine benchmarks of the LD-MoLE paper, and messages of ten domains, as tasks with one interface."""

from ldmole_ds.tasks.benchmarks.load import load_task
from ldmole_ds.tasks.benchmarks.registry import TASKS, Task, tasks_of

__all__ = ["TASKS", "Task", "load_task", "tasks_of"]

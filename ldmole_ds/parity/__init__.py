"""The contract that the layout never changes the training, as something that can be run: on any ranks, by anyone.

One small model trains five steps on one global batch, once as a single dense process and once in each layout; losses,
gradient norms and weights must agree. The tests, ``benchmarks/parity_matrix.py`` and ``launch/doctor.py --parity`` run
the same code.
"""

from ldmole_ds.parity.cells import Cell, default_cells, full_matrix
from ldmole_ds.parity.compare import Verdict, judge, verdict_table
from ldmole_ds.parity.dense import dense_run
from ldmole_ds.parity.engine import run_cells
from ldmole_ds.parity.job import exit_code, job_cells, run_job

__all__ = [
    "Cell",
    "Verdict",
    "default_cells",
    "dense_run",
    "exit_code",
    "full_matrix",
    "job_cells",
    "judge",
    "run_cells",
    "run_job",
    "verdict_table",
]

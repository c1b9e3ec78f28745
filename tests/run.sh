#!/usr/bin/env bash
# Sets up a virtual environment and runs lint, format check and tests. Arguments are passed on to pytest.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/ops -k sparsegen
#   bash tests/run.sh -n 0 tests/ops --pdb        (in one process; otherwise two share the files)
#
# See launch/setup_venv.sh for which environment is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_venv.sh
setup_venv "$PWD" demo,test

export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
exec python -m pytest -n 2 --dist loadfile "$@"

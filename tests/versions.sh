#!/usr/bin/env bash
# The tests with the oldest or the newest versions that setup.py allows, in an empty environment of their own:
#   tests/versions.sh oldest|newest [arguments of pytest]
# PYTHON chooses the interpreter, VENV a folder that keeps the environment for another run.
set -euo pipefail
which=$1
shift
cd "$(dirname "$0")/.."
versions=$PWD/tests/$which.txt

environment=${VENV:-$(mktemp -d)}
[ -n "${VENV:-}" ] || trap 'rm -rf "$environment"' EXIT
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
# shellcheck disable=SC1091
. "$environment/bin/activate"
pip install --quiet -r "$versions"                        # the test extra pins the diffusers of constraints.txt
pip install --quiet -c "$versions" .
pip check
python -m pytest "$@"

#!/usr/bin/env bash
# The tests twice: with all instruction sets of this machine, then with those above AVX2 masked. Takes pytest's arguments:
#   tests/masked.sh tests/kernels tests/test_ops.py
set -euo pipefail
cd "$(dirname "$0")/.."

env -u ATEN_CPU_CAPABILITY -u ONEDNN_MAX_CPU_ISA -u LDM2_CPU_ISA python -m pytest "$@"
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 LDM2_CPU_ISA=avx2 python -m pytest "$@"

#!/usr/bin/env bash
# The tests of the CPU kernels on a build with the address and undefined-behaviour sanitizers.
#
#   BIN=.venv/bin [LEVEL=avx2] bash scripts/sanitize.sh [arguments of pytest]
#
# Builds csrc/ into a folder of its own and puts it in front of the installed module; nothing installed changes. LEVEL:
# only this instruction set, or `highest` for the highest of this machine, which builds in a fifth of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${BIN:-.venv/bin}/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m pip install -q --target "$folder/tools" pybind11
level=${LEVEL:-}
if [ "$level" = highest ]; then
  level=$("$python" -c 'import torch; from rnas import _cpu; print(_cpu.simd_levels()[-1])')
fi
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
cmake -S csrc -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$flags" -DRNAS_LEVEL="$level" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$folder/tools/pybind11/share/cmake/pybind11" >"$folder/log" || { cat "$folder/log"; exit 1; }
cmake --build "$folder/build" >"$folder/log" || { cat "$folder/log"; exit 1; }

# The sanitizers' runtime has to come before everything else; Python's own leaks are not what is looked for.
export RNAS_CPU_MODULE="$(echo "$folder"/build/_cpu*.so)"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -m pytest -q -p scripts.sanitized_module tests/test_mixed_op.py tests/test_relu_conv_norm.py \
  tests/test_conv_norm.py tests/test_pgd_step.py tests/test_fused.py tests/test_profile.py -k "not compiles and not opcheck" "$@"

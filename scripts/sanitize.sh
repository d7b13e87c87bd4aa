#!/usr/bin/env bash
# The tests of the CPU kernels on a build with the address and undefined-behaviour sanitizers.
#
#   BIN=.venv/bin bash scripts/sanitize.sh [arguments of pytest]
#
# Builds csrc/ into a folder of its own and puts it in front of the installed module; nothing installed changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${BIN:-.venv/bin}/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m pip install -q --target "$folder/tools" pybind11
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
cmake -S csrc -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$flags" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$folder/tools/pybind11/share/cmake/pybind11" >"$folder/log" || { cat "$folder/log"; exit 1; }
cmake --build "$folder/build" >"$folder/log" || { cat "$folder/log"; exit 1; }

# The sanitizers' runtime has to come before everything else; Python's own leaks are not what is looked for.
export RNAS_CPU_MODULE="$(echo "$folder"/build/_cpu*.so)"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -m pytest -q -p scripts.sanitized_module tests/test_mixed_op.py tests/test_relu_conv_norm.py \
  tests/test_pgd_step.py tests/test_fused.py -k "not compiles and not opcheck" "$@"

#!/usr/bin/env bash
# The tests of the CPU kernels, and some of the CUDA kernels as they run on the host, on a build with the address and
# undefined-behaviour sanitizers.
#
#   BIN=.venv/bin [LEVEL=avx2] [SAMPLE=2] bash scripts/sanitize.sh [arguments of pytest]
#
# Builds csrc/ into a folder of its own and puts it in front of the installed module; nothing installed changes. LEVEL:
# only this instruction set, or `highest` for the highest of this machine, which builds in a fifth of the time. SAMPLE:
# every second (third, ...) test of the CPU kernels, chosen by its name.
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
options=(-G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$flags" -DRNAS_LEVEL="$level"
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
  -Dpybind11_DIR="$folder/tools/pybind11/share/cmake/pybind11")
{
  cmake -S csrc -B "$folder/build" "${options[@]}" -DRNAS_CUDA_ON_HOST=ON &&
    cmake --build "$folder/build" --target _cpu _cuda_on_host
} >"$folder/log" || { cat "$folder/log"; exit 1; }

# The sanitizers' runtime has to come before everything else; Python's own leaks are not what is looked for.
export RNAS_SAMPLE=${SAMPLE:-1}
export RNAS_CPU_MODULE="$(echo "$folder"/build/_cpu*.so)"
export RNAS_CUDA_ON_HOST_MODULE="$(echo "$folder"/build/_cuda_on_host*.so)"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -m pytest -q -n "${WORKERS:-2}" -p scripts.sanitized_module tests/test_mixed_op.py tests/test_relu_conv_norm.py \
  tests/test_conv_norm.py tests/test_partial.py tests/test_pgd_step.py tests/test_fused.py tests/test_profile.py \
  -k "not compiles and not opcheck" "$@"
# The CUDA kernels as plain C++: what they read and write, thread by thread.
"$python" -m pytest -q -n "${WORKERS:-2}" tests/test_mixed_op_cuda.py \
  -k "test_values_and_all_gradients or test_every_primitive_alone or test_second_derivatives or test_any_alignment"
"$python" -m pytest -q -n "${WORKERS:-2}" tests/test_mixed_op_cuda_halves.py \
  -k "(test_values_and_all_gradients and converted) or test_second_derivatives_of_a_cell or test_any_alignment"

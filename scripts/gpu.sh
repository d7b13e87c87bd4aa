#!/usr/bin/env bash
# On a machine with a GPU: builds the package, runs the GPU tests, checks memory accesses, and measures. Under 9 minutes.
#
#   PYTHON=python3 OUT=benchmarks/results scripts/gpu.sh
#   CHANNELS=36 scripts/gpu.sh        measures supernets of this width alone, into <device>.c36.json
#
# Downloads nothing: PYTHON must have torch, setuptools, pybind11, cmake, ninja, pytest, pytest-benchmark, hypothesis, and
# nvcc must be on PATH or under CUDA_HOME. Without write access to that Python the package goes into a folder of its own.
# Writes <device>.json and logs to OUT. Exit code 0: tests green and measured; 1: anything else. Red tests are not timed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

say() { printf '\n%4ds  %s\n' "$SECONDS" "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
# part SECONDS NAME COMMAND...: runs a part with a time limit, its output here and in OUT/gpu-NAME.log
part() {
  local limit=$1 name=$2
  shift 2
  timeout -k 10 "$limit" "$@" 2>&1 </dev/null | tee "$OUT/gpu-$name.log"
  return "${PIPESTATUS[0]}"
}

command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; set PYTHON to an interpreter that has torch"
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON has no torch; set PYTHON to an interpreter that has it"
capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
  fail "no CUDA device is visible to $PYTHON; this command needs a machine with a GPU (without one: make test, make bench)"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || fail "cannot write to OUT=$OUT"

# The source folder must not stand before the installed package, where rnas.kernels and the compiled modules are.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
offline=(-m pip install --no-build-isolation --no-deps --no-index)

say "build for compute capability $TORCH_CUDA_ARCH_LIST"
broken() { tail -n 40 "$OUT/gpu-build.log" >&2; fail "the package does not build"; }
if "$PYTHON" -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) >= 77)'; then
  say "setuptools is too old to install the package, building in a copy"
  mkdir "$WORK/copy" && cp -r setup.py csrc rnas kernels "$WORK/copy" && rm -rf "$WORK"/copy/rnas/{kernels,*.so}
  ln -s ../kernels "$WORK/copy/rnas/kernels"
  (cd "$WORK/copy" && part 120 build "$PYTHON" setup.py build_ext --inplace >/dev/null) || broken
  export PYTHONPATH=$WORK/copy${PYTHONPATH:+:$PYTHONPATH}
elif ! part 120 build "$PYTHON" "${offline[@]}" -e . >/dev/null; then
  say "no editable install (see gpu-build.log), trying a folder of its own"
  part 120 build "$PYTHON" "${offline[@]}" --target "$WORK/site" . >/dev/null || broken
  export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" - <<'PYTHON' || fail "the compiled CUDA module does not serve on this GPU"
import torch

from rnas.kernels import backend

for row in backend.describe():
    print(f"{row.op:<12} {row.backend:<10} {row.serves or 'off':<32} {row.reason}")
name, reason = backend.OPS["pgd_step"].decide(torch.device("cuda", 0), torch.float32)
raise SystemExit(None if name == "cuda" else f"pgd_step is served by {name}: {reason}")
PYTHON

# Only files with GPU tests: others may need packages that are not here.
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
[ "${#files[@]}" -gt 0 ] || fail "no test is marked gpu"
say "tests on the GPU: ${files[*]}"
part 170 tests "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}" || fail "GPU tests are red: nothing is timed"

if command -v compute-sanitizer >/dev/null && [ -f tests/test_pgd_step.py ]; then
  say "memory accesses of pgd_step"
  # Without PyTorch's caching allocator, or an access past the end of one tensor lands in another and is not seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part 80 sanitizer \
    compute-sanitizer --tool memcheck --error-exitcode 86 \
    "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider tests/test_pgd_step.py
  case $? in
    0) ;;
    86) fail "compute-sanitizer found an error" ;;
    124 | 137) say "compute-sanitizer did not end in time; it found nothing so far" ;;
    *) say "compute-sanitizer cannot run here, or the tests are too slow under it (see gpu-sanitizer.log)" ;;
  esac
fi

say "benchmarks"
# What the other parts left of 530 seconds. A run that is cut short has written the groups that it finished.
what=(benchmarks)
[ -z "${CHANNELS:-}" ] || what=(benchmarks/test_supernet_speed.py --channels "$CHANNELS")
part "$((530 - SECONDS))" benchmarks "$PYTHON" -m pytest "${what[@]}" -q -s --device cuda --results "$OUT" -p no:cacheprovider
status=$?
[ "$status" -eq 0 ] || fail "benchmarks ended with exit code $status (124: out of time); what was measured is in $OUT"
[ "$OUT" != "$PWD/benchmarks/results" ] || "$PYTHON" scripts/render_readme.py
say "done: results and logs are in $OUT"

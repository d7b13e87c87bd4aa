#!/usr/bin/env bash
# Installs the package in every supported way into throw-away environments and uses each installation.
#
#   scripts/check_packaging.sh            PYTHON=... for another interpreter; it needs torch and `build`
#
# The throw-away environments see the torch of the running one, so nothing large is downloaded. The working tree and the
# running environment are left alone. Takes two to three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python}")
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")  # not realpath: the link is what makes it an environment
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
unset PYTHONPATH CXX CUDACXX CUDA_HOME CUDA_PATH FORCE_CUDA TORCH_CUDA_ARCH_LIST RNAS_BACKEND CMAKE_ARGS
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

step() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# A copy of the sources without what earlier builds have left.
SOURCE=$WORK/source
mkdir "$SOURCE"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude='*.egg-info' --exclude=assets/.cache \
  csrc kernels rnas tests scripts examples setup.py pyproject.toml MANIFEST.in $(ls -d README* LICENSE* 2>/dev/null) | tar -x -C "$SOURCE"

# environment NAME: a virtual environment that sees the packages of the running one, but not its installation of rnas.
environment() {
  "$PYTHON" -m venv --without-pip "$WORK/$1"
  "$WORK/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$WORK/$1/site"
  "$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' >"$(cat "$WORK/$1/site")/torch.pth"
}

# install NAME ARGUMENTS...: pip install into that environment, its output in NAME.log. --ignore-installed, or pip would
# try to remove the rnas of the running environment.
install() {
  local name=$1
  shift
  environment "$name"
  "$PYTHON" -m pip --python "$WORK/$name/bin/python" install -v --no-deps --ignore-installed "$@" >"$WORK/$name.log" 2>&1 ||
    { tail -n 40 "$WORK/$name.log" >&2; fail "installing $name"; }
}

# use NAME MODULES [FOLDER]: take a step with the installation, from FOLDER. MODULES: the compiled modules expected.
use() {
  (cd "${3:-$WORK}" && "$WORK/$1/bin/python" - "$2" "${4:-$WORK/$1}") <<'PYTHON' || fail "using $1"
import importlib.util
import sys
from pathlib import Path

import torch

import rnas
from rnas.kernels import backend, pgd_step
from rnas.kernels.reference import pgd_step as reference

expected, place = set(sys.argv[1].split()), sys.argv[2]
for module in (rnas, sys.modules["rnas.kernels"], reference):
    assert Path(module.__file__).is_relative_to(place), f"{module.__file__} is not in {place}"
found = {name for name in ("_cpu", "_cuda") if importlib.util.find_spec(f"rnas.{name}")}
assert found == expected, f"expected the modules {expected}, found {found}"
assert (backend.include_dir() / "rnas" / "pgd_step.h").is_file(), "the C++ headers are missing"
assert list((Path(rnas.__file__).parent / "assets").iterdir()), "the package data are missing"
x_adv, grad, x = torch.rand(3, 3, 17, 17), torch.randn(3, 3, 17, 17), torch.rand(3, 3, 17, 17)
numbers = {"epsilon": 0.03, "step_size": 0.01}
assert torch.equal(pgd_step(x_adv, grad, x, **numbers), reference.pgd_step(x_adv, grad, x, **numbers))
rows = {row.backend: row for row in backend.describe() if row.op == "pgd_step"}
assert bool(rows["cpu"].serves) == ("_cpu" in expected), rows["cpu"]
if "_cpu" not in expected:
    assert "not built" in rows["cpu"].reason
if "_cuda" in expected:
    assert backend.architectures() == ["sm_90", "compute_90"], backend.architectures()
PYTHON
}

said() { grep -q -- "$2" "$WORK/$1.log" || fail "$1 did not say: $2"; }

# A PATH with every program of this one, less the names given.
path_without() {
  local folder=$WORK/path.$RANDOM directory
  mkdir "$folder"
  IFS=:
  for directory in $PATH; do ln -s "$directory"/* "$folder" 2>/dev/null || true; done
  unset IFS
  for name in "$@"; do rm -f "$folder"/$name; done
  echo "$folder"
}
COMPILERS=(cc c++ gcc g++ clang clang++ 'gcc-[0-9]*' 'g++-[0-9]*' 'clang-[0-9]*' 'clang++-[0-9]*' '*-linux-gnu-g++*' '*-linux-gnu-gcc*' nvcc)

# Runs a compiler, or hands out what it has made of the same text with the same options before.
mkdir "$WORK/compiled"
cat >"$WORK/once" <<'LAUNCHER'
#!/usr/bin/env bash
set -euo pipefail
command=("$@") preprocess=() object=
for ((i = 0; i < $#; i++)); do
  case ${command[i]} in
    -o) object=${command[++i]} ;;
    -MF | -MT) i=$((i + 1)) ;;
    -MD | -c) ;;
    *) preprocess+=("${command[i]}") ;;
  esac
done
[[ -n $object && " $* " == *' -c '* ]] || exec "$@"
key=$({ printf '%s\n' "${preprocess[@]}" | grep -v / || true; "${preprocess[@]}" -E -P; } | sha256sum | cut -c 1-64)
kept=${0%/*}/compiled/$key
if [ -f "$kept" ]; then exec cp "$kept" "$object"; fi
"$@"
cp "$object" "$kept.$$" && mv "$kept.$$" "$kept"
LAUNCHER
chmod +x "$WORK/once"

# It is the ways to install that count here: one instruction set, little optimisation, one architecture, each file once.
export CMAKE_ARGS="-DRNAS_LEVEL=baseline -DCMAKE_CXX_COMPILER_LAUNCHER=$WORK/once"
MODULES=_cpu
if command -v nvcc >/dev/null; then
  MODULES='_cpu _cuda'
  export TORCH_CUDA_ARCH_LIST='9.0+PTX'
fi

step 'sdist, a wheel from it, the wheel installed'
(cd "$WORK" && "$PYTHON" -m build --outdir "$WORK/dist" "$SOURCE" >"$WORK/build.log" 2>&1) ||
  { tail -n 40 "$WORK/build.log" >&2; fail 'building sdist and wheel'; }
tar -tzf "$WORK"/dist/*.tar.gz >"$WORK/sdist.list"
for name in examples/cpp/CMakeLists.txt examples/mixed_op.py; do
  grep -q "/$name\$" "$WORK/sdist.list" || fail "no $name in the sdist"
done
install wheel "$WORK"/dist/*.whl
use wheel "$MODULES"
for name in wheel/bin/rnas; do [ -x "$WORK/$name" ] || fail "no command $name"; done

step 'editable install, used from elsewhere and from the root of the sources'
FORCE_CUDA=0 install editable -e "$SOURCE"
use editable _cpu "$WORK" "$SOURCE"
use editable _cpu "$SOURCE" "$SOURCE"
rm -f "$SOURCE"/rnas/*.so

# What follows is about what is built, and not about how its tools get here.
HERE=(--no-build-isolation)

step 'pip install ., CUDA left out by FORCE_CUDA=0'
FORCE_CUDA=0 install no_cuda "${HERE[@]}" "$SOURCE"
said no_cuda 'building rnas._cpu only (FORCE_CUDA=0)'
use no_cuda _cpu

step 'pip install . without nvcc'
WITHOUT_NVCC=$(path_without nvcc)
PATH=$WITHOUT_NVCC install no_nvcc "${HERE[@]}" "$SOURCE"
said no_nvcc 'building rnas._cpu only (no nvcc found)'
use no_nvcc _cpu

step 'pip install . without nvcc, FORCE_CUDA=1: refused'
environment forced
if PATH=$WITHOUT_NVCC FORCE_CUDA=1 "$PYTHON" -m pip --python "$WORK/forced/bin/python" install -v --no-deps \
  --ignore-installed "${HERE[@]}" "$SOURCE" >"$WORK/forced.log" 2>&1; then fail 'FORCE_CUDA=1 without nvcc was accepted'; fi
said forced 'FORCE_CUDA=1 and no nvcc was found'

step 'pip install . without a compiler: plain PyTorch'
PATH=$(path_without "${COMPILERS[@]}") install no_compiler "${HERE[@]}" "$SOURCE"
said no_compiler 'no C++ compiler found: building without compiled kernels'
use no_compiler ''

step 'all installations work'

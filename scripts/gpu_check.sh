#!/usr/bin/env bash
# What only a GPU can show: builds blockdraft against the torch of this machine, runs the tests of the GPU backend and of
# generation, the kernels under compute-sanitizer, and the benchmarks. Takes nothing from a network and at most nine
# minutes; a stage that does not fit is cut off or left out, and report.md says so.
#
# usage: scripts/gpu_check.sh [OUTDIR]      report.json, report.md and a log per stage; default build/gpu_check
#
#   PYTHON=python3    the interpreter that has torch
#   WHEELS=folder     wheels to install beside it first, for packages that it lacks
#   BUDGET=520        seconds for everything
#
# Exit status: 0 all passed, 1 something failed, was cut off or left out, 2 not a machine to do this on.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-520}
out=${1:-build/gpu_check}
mkdir -p "$out" || exit 2
out=$(realpath "$out")
stages=$out/stages.tsv
package=$out/package # the Python files and the libraries built here
rm -rf "$package" "$out"/*.log "$out"/*.json "$out"/*.md "$out"/*.xml "$stages"
mkdir -p "$package/site"
export PYTHON out package
export PYTHONPATH=$package:$package/site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PIP_DISABLE_PIP_VERSION_CHECK=1

give_up() {
  printf 'gpu_check: %s\n' "$*" >&2
  exit 2
}

record() { # name, result, seconds, reason
  printf '%s\t%s\t%s\t%s\n' "$@" >> "$stages"
  printf '== %-22s %-9s %4s s  %s\n' "$@"
}

# stage NAME SECONDS COMMAND...: runs it with what is left of the budget at most.
stage() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS status
  shift 2
  if [ "$left" -lt 10 ]; then
    record "$name" skipped 0 "no time left"
    return 1
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    0) record "$name" passed $((SECONDS - start)) "" ;;
    124 | 137) record "$name" "cut off" $((SECONDS - start)) "after $limit s" ;;
    *) record "$name" failed $((SECONDS - start)) "status $status, see $name.log" ;;
  esac
  return "$status"
}

build() {
  set -e
  cp -r python/blockdraft "$package/"
  rm -f "$package"/blockdraft/*.so
  "$PYTHON" -c 'import torch; print("CUDA" if torch.version.cuda else "HIP", torch.__version__)'
  backend=$("$PYTHON" -c 'import torch; print("cuda" if torch.version.cuda else "hip")')
  cmake -G Ninja -S . -B "$out/build" -DCMAKE_BUILD_TYPE=Release "-DBLOCKDRAFT_GPU=$backend" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)"
  cmake --build "$out/build"
  find "$out/build" -name '_*.so' -exec cp {} "$package/blockdraft/" \;
}
export -f build

sanitizer() { # tool
  if ! command -v compute-sanitizer > /dev/null; then
    record "sanitizer-$1" skipped 0 "no compute-sanitizer on PATH"
    return 1
  fi
  # Without torch's pool of memory an access beyond a tensor is one beyond its allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "sanitizer-$1" 50 \
    compute-sanitizer --tool "$1" --error-exitcode 99 "$PYTHON" tools/gpu_cases.py
}

[ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install -q --no-index --no-deps --target "$package/site" "$WHEELS"/*.whl ||
  give_up "the wheels in $WHEELS could not be installed"
"$PYTHON" -c 'import torch' 2> /dev/null || give_up "$PYTHON has no torch"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  give_up "no GPU that torch can use. Without one, make gpu-gates and make gpu-emulator check the kernels"
for tool in cmake ninja; do
  command -v $tool > /dev/null || give_up "no $tool on PATH"
done
for module in pybind11 pytest numpy tokenizers safetensors tqdm; do
  "$PYTHON" -c "import $module" 2> /dev/null || give_up "$PYTHON has no $module; give its wheel with WHEELS=folder"
done

if stage build 200 bash -c build; then
  stage tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$out/tests.xml" -m 'not emulated' -k gpu tests/ops
  BLOCKDRAFT_TEST_FULL=1 stage generation 120 "$PYTHON" -m pytest -q -rs -p no:cacheprovider --durations=0 \
    --junitxml="$out/generation.xml" -m 'not emulated' -k gpu tests/generation
  stage bench 120 "$PYTHON" -m blockdraft.bench --device cuda --rows 1,16,64 --seconds 0.3 --json "$out/bench.json"
  for tool in memcheck racecheck synccheck initcheck; do sanitizer $tool; done
else
  for name in tests generation bench sanitizer-{memcheck,racecheck,synccheck,initcheck}; do record "$name" skipped 0 "not built"; done
fi
"$PYTHON" tools/gpu_report.py "$out"

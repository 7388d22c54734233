#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can tell; needs no network. A stage is ended after ten minutes.
#
#   benchmarks/on_gpu.sh test       the tests that need a GPU
#   benchmarks/on_gpu.sh sanitize   small ones of them under each tool of compute-sanitizer
#   benchmarks/on_gpu.sh bench      the quick benchmarks: records in $OUT
#   benchmarks/on_gpu.sh profile    Nsight Compute reports of the attention and InfoNCE kernels in $OUT
#
# PYTHON (python3) needs PyTorch, Triton, transformers and pytest, and OUT (outputs/gpu) is where logs and records go.
# Where sami_fast is not installed it is, from this folder; where that fails, it runs from the source tree without _C.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-outputs/gpu}

prepare() {
  mkdir -p "$OUT"
  "$PYTHON" -c 'import sami_fast._C as C, sami_fast.kernels.launch; assert C.cuda_version(), "built without nvcc"' \
    2>>"$OUT/install.log" && return
  if SAMI_FAST_CUDA=ON "$PYTHON" -m pip install --no-deps --no-index --no-build-isolation --editable . >>"$OUT/install.log" 2>&1; then
    return
  fi
  tail -n 5 "$OUT/install.log" >&2
  echo "on_gpu.sh: not installed; the source tree is used as it is, without sami_fast._C" >&2
  [ -e sami_fast/kernels ] || ln -s ../kernels sami_fast/kernels
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
}

gpu_tests() {  # only files with such tests: collecting the others takes longer, and packages that they import
  # shellcheck disable=SC2046
  timeout 580 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider $(grep -l 'mark\.gpu' tests/test_*.py) "$@"
}

sanitize() {
  # Kernels of every source on small shapes; what is captured in a graph needs the caching allocator, which hides errors.
  local small='(test_csrc or test_infonce or test_awkward_offsets or (test_against_oracle and shape0 and dtype1)
    or (test_against_the_oracle and shape0)) and not (cuda_graph or largest or 256)' failed=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "compute-sanitizer --tool $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 140 compute-sanitizer --tool "$tool" --target-processes all \
      --error-exitcode 9 --print-limit 20 --log-file "$OUT/$tool-%p.log" \
      "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -k "${small//$'\n'/ }" \
      $(grep -l 'mark\.gpu' tests/test_*.py) || { failed=1; echo "$tool: failed, see $OUT/$tool-*.log"; }
  done
  return "$failed"
}

bench() {
  "$PYTHON" -m benchmarks attention logprob infonce step --device cuda --quick --budget 80 --out "$OUT" "$@"
}

profile() {
  for suite in attention infonce; do
    timeout 240 ncu --target-processes all --clock-control none --set full --launch-skip 8 --launch-count 12 \
      --kernel-name 'regex:(_forward|_grad_q|_grad_kv|_backward)_kernel' --force-overwrite --export "$OUT/$suite" \
      "$PYTHON" -m benchmarks "$suite" --device cuda --quick --budget 120 --out "$OUT/profiled"
  done
}

stage=${1:-}
case $stage in
  test) shift; prepare; gpu_tests "$@" ;;
  sanitize) prepare; sanitize ;;
  bench) shift; prepare; bench "$@" ;;
  profile) prepare; profile ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# All that needs a GPU, in one command and at most nine minutes: tests, steps, the textbook way, 801
# epochs of one seed, nine seeds together, memory. See benchmarks/README.md.
#
#     bash benchmarks/gpu.sh
#     DEVICE=cpu PROFILE=smoke bash benchmarks/gpu.sh    # the mechanics, without a GPU
#
# PYTHON, OUT (outputs/gpu), DATA (npz:cifar10.npz) or CLL_DATA (a folder with CIFAR-10) may be set.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-outputs/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TQDM_DISABLE=1
mkdir -p "$OUT"
needs='import torch, torchvision, numpy, pandas, matplotlib, contourpy, yaml, tqdm, pydantic, sklearn
import scipy, safetensors, pytest, hypothesis, PIL'
if ! "$PYTHON" -c "$needs" 2>/dev/null; then
  echo "installing what is missing (progress: $OUT/install.log)"
  "$PYTHON" -m pip install -e . pytest hypothesis pillow >"$OUT/install.log" 2>&1 ||
    { echo "FAILED: $(grep -m 1 ERROR "$OUT/install.log")"; exit 1; }
fi
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
rm -f "$OUT"/*.status "$OUT"/*.json

trap 'kill $(jobs -p) 2>/dev/null; exit 1' INT TERM  # the stage at work ends with this script
slow=$([ "${PROFILE:-}" = smoke ] && echo 10 || echo 1)  # the mechanics, on a machine however busy
stage() {  # name, seconds, command: apart, for so long, never beyond nine minutes in all
  left=$((530 * slow - SECONDS > 1 ? 530 * slow - SECONDS : 1))
  timeout -k 5 $(($2 * slow < left ? $2 * slow : left)) "${@:3}" >"$OUT/$1.log" 2>&1 &
  wait $!
  status=$?
  echo $status >"$OUT/$1.status"
  echo "$1: status $status after $SECONDS s"
}
options=(--into "$OUT" --device "${DEVICE:-cuda}" --data "${DATA:-}" --profile "${PROFILE:-full}")
stage tests 140 "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider tests/test_cuda.py tests/test_data.py
tail -n 1 "$OUT/tests.log"
tests=$(cat "$OUT/tests.status")
stage steps 60 "$PYTHON" benchmarks/gpu.py steps "${options[@]}"
stage baseline 60 "$PYTHON" benchmarks/gpu.py baseline "${options[@]}"
stage memory 40 "$PYTHON" benchmarks/gpu.py memory "${options[@]}"
stage single 240 "$PYTHON" benchmarks/gpu.py single "${options[@]}"
stage nine 540 "$PYTHON" benchmarks/gpu.py nine "${options[@]}"
"$PYTHON" benchmarks/gpu.py summary "${options[@]}" && exit "$tests"

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
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
timeout 140 "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider tests/test_cuda.py tests/test_data.py \
  >"$OUT/tests.log" 2>&1
tests=$?
echo "tests: $(tail -n 1 "$OUT/tests.log") (all of them: $OUT/tests.log)"
"$PYTHON" benchmarks/gpu.py --into "$OUT" --device "${DEVICE:-cuda}" --data "${DATA:-}" \
  --profile "${PROFILE:-full}" --seconds $((540 - SECONDS)) && exit $tests

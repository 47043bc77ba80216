#!/usr/bin/env bash
# Train and certify the paper's runs, full schedule, those that tell most first, for as long as there
# is time; then collect what has finished into outputs/reference. Repeat it to go on where it stopped.
#
#     MINUTES=29 bash tools/reference.sh
#     DATA=npz:cifar10.npz LABEL='cifar10 (recovered)' bash tools/reference.sh   # a copy of CIFAR-10
#     PROFILE=smoke OUT=/tmp/try MINUTES=10 bash tools/reference.sh 4C3F         # files named so
#
# May be set: PYTHON, OUT (outputs), MINUTES (no limit), SEEDS ("1 2 3 4 5 6 7 8 9"), PROFILE (paper),
# DEVICE (cuda), CLL_DATA (a folder with CIFAR-10, CIFAR-100 and tiny-imagenet-200).
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-outputs} PROFILE=${PROFILE:-paper} SEEDS=${SEEDS:-1 2 3 4 5 6 7 8 9}
end=$((SECONDS + 60 * ${MINUTES:-1000000})) failed=0 wanted=${1:-}

# run SEEDS FILES...: files in turn, seeds together; returns 1 when the time is up
run() {
  local seeds=$1 file own status
  shift
  for file in "$@"; do
    [[ $file == *"$wanted"* ]] || continue
    own=()
    [[ $file == */cifar10-* && -n ${DATA:-} ]] && own=(--data "$DATA" --label "${LABEL:-$DATA}")
    [ $((end - SECONDS)) -gt 0 ] || return 1
    echo "== $file, seeds $seeds${MINUTES:+, $(((end - SECONDS) / 60)) min left}"
    # an interrupt, as from a keyboard: the run ends in order and resumes from its checkpoint
    timeout --signal=INT --kill-after=60 $((end - SECONDS)) "$PYTHON" -m cll "$file" \
      --profile "$PROFILE" --device "${DEVICE:-cuda}" --outputs "$OUT" --seeds $seeds "${own[@]}"
    status=$?
    [ $status -ne 124 ] || return 1
    [ $status -eq 0 ] || { echo "FAILED $file"; failed=1; }
  done
}

all() {
  local two=params/table2 one=params/table1 some
  some=$(echo "$SEEDS" | cut -d' ' -f1-3)
  run "$SEEDS" $two/cifar10-4C3F-{CLL,GloRo}.yaml || return
  run "$SEEDS" $two/cifar10-6C2F-{CLL,GloRo}.yaml || return
  run "${SEEDS%% *}" params/figure5/*eps*.yaml params/figure5/*CLL-p*.yaml params/lambda_sweep/*.yaml ||
    return
  run "$some" $one/tiny-8C2F-{CLL-eps0.5,CLL-eps1.0,GloRo}.yaml || return
  run "${SEEDS%% *}" $two/cifar10{,0}-LipConvNet-20-{SOC,CLL}.yaml $two/cifar10{,0}-CPL-XL-*.yaml \
    $two/cifar10{,0}-SLL-XL-*.yaml || return
  run "$some" params/ablation/*.yaml
}

all || echo "time is up: repeat the command to go on"
if [ "$PROFILE" != smoke ]; then
  "$PYTHON" tools/collect.py "$OUT/$PROFILE" || failed=1
fi
exit $failed

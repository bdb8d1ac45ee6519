#!/usr/bin/env bash
# What a GPU makes of this package, in one table: at most six minutes on one GPU, and no download.
#
#     benchmarks/gpu.sh [FOLDER]            # writes gpu.md, gpu.csv and a log per stage, by default into runs/gpu
#
# It needs: pip install ".[test]" torchvision (or timm instead of torchvision; without both the ResNet-18 is skipped).
# Each stage has a time limit, and keeps what it measured until an error. The exit code is 0 if all stages went well.
# DEVICE=cpu runs all of it on a few numbers, the tests on a made-up device. PATIENCE=5 makes each limit 5 times as long.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

out=${1:-runs/gpu} failed=0
options=(--out "$out" --device cuda) tests=(--device cuda -n 4 --dist load)
if [ "${DEVICE:-cuda}" = cpu ]; then
  options=(--out "$out" --device cpu --tiny) tests=(--device madeup -n 0)
fi
mkdir -p "$out"
rm -f -- "$out"/{tests.txt,parts.csv,step.csv,age.csv,gpu.md,gpu.csv}
rm -rf -- "$out"/age-*
echo "what,value,unit,detail" > "$out/stages.csv"

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) start=$SECONDS code
  shift 2
  echo "+ $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  code=${PIPESTATUS[0]}
  echo "$name: exit code $code (0: well; 124 or 137: time limit); took,$((SECONDS - start)),s," >> "$out/stages.csv"
  [ "$code" = 0 ] || failed=1
}

stage tests 140 python -m pytest -q -m gpu "${tests[@]}" -p no:cacheprovider tests/test_gpu.py
stage parts 30 python benchmarks/gpu.py parts "${options[@]}"
stage step 100 python benchmarks/gpu.py step "${options[@]}"
stage age 60 python benchmarks/gpu.py age "${options[@]}"
stage table 10 python benchmarks/gpu.py table "${options[@]}"
exit "$failed"

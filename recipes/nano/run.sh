#!/usr/bin/env bash
# The bundled model from nothing: about an hour on 2 cores. Writes OUT/ (default build/nano) and an evaluation.
set -euo pipefail
cd "$(dirname "$0")"
out=$(mkdir -p "${1:-../../build/nano}" && cd "${1:-../../build/nano}" && pwd)
python=${PYTHON:-python}

# glibc returns freed memory to the system by default; a training step would fault it in again, a sixth of its time.
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000

# AR pre-training, then the TiDAR objective on the same text.
$python train.py "$out/stage1" --steps 1000 --convert-steps 200 --decay 0.93 --constant-rate
# The TiDAR objective, half of it on the model's own continuations.
$python own_text.py "$out/stage1" "$out/own_text.pt" --count 2500
$python train.py "$out/stage2" --init "$out/stage1" --own-text "$out/own_text.pt" --steps 0 --convert-steps 650 \
  --batch 16 --length 256
# The same again, twice, each time on what the last model writes.
$python own_text.py "$out/stage2" "$out/own_text_2.pt" --count 3000 --seed 100000
$python train.py "$out/stage3" --init "$out/stage2" --own-text "$out/own_text_2.pt" --steps 0 --convert-steps 1000 \
  --batch 16 --length 256 --decay 0.8
$python own_text.py "$out/stage3" "$out/own_text_3.pt" --count 3000 --seed 200000
$python train.py "$out/stage4" --init "$out/stage3" --own-text "$out/own_text_3.pt" --steps 0 --convert-steps 640 \
  --batch 16 --length 256 --decay 0.8
$python evaluate.py "$out/stage4" --json "$out/evaluation.json"

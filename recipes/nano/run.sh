#!/usr/bin/env bash
# The bundled model from nothing. Writes OUT/ (default build/nano) and an evaluation. The first four stages take about an
# hour on 2 cores and give a model that drafts; LONG=1 adds the three of the bundled weights, an hour more.
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
last=stage4

# Masks after true text learn the model's own continuation of it.
if [[ -n ${LONG:-} ]]; then
  $python branches.py "$out/stage4" "$out/branches_5.pt" --count 4800 --seed 7
  $python own_text.py "$out/stage4" "$out/own_text_5.pt" --count 3000 --seed 300000
  $python train.py "$out/stage5" --init "$out/stage4" --own-text "$out/own_text_5.pt" --branches "$out/branches_5.pt" \
    --steps 0 --convert-steps 1000 --batch 16 --length 256 --decay 0.8 --alpha 0.6
  $python branches.py "$out/stage5" "$out/branches_6.pt" --count 6400 --seed 8
  $python own_text.py "$out/stage5" "$out/own_text_6.pt" --count 3000 --seed 400000
  $python train.py "$out/stage6" --init "$out/stage5" --own-text "$out/own_text_6.pt" --branches "$out/branches_6.pt" \
    --steps 0 --convert-steps 1000 --batch 16 --length 256 --decay 0.8 --rate 2e-3
  $python branches.py "$out/stage6" "$out/branches_7.pt" --count 6400 --seed 9
  $python own_text.py "$out/stage6" "$out/own_text_7.pt" --count 2000 --seed 500000
  $python train.py "$out/stage7" --init "$out/stage6" --own-text "$out/own_text_7.pt" --own-rows 4 \
    --branches "$out/branches_7.pt" --steps 0 --convert-steps 950 --batch 16 --length 256 --decay 0.8 --alpha 0.4
  last=stage7
fi
$python evaluate.py "$out/$last" --json "$out/evaluation.json"

#!/usr/bin/env bash
# The whole job on real input: the commands of README.md, one after the other. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=output/demo
rm -rf "$out" && mkdir -p "$out"

step() {  # step NAME COMMAND...: say what runs, run it, note how long it took
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n$ %s\n' "$name" "$*"
  "$@" || { echo "the step '$name' failed" >&2; exit 1; }
  printf '%s\t%s\n' "$name" "$((SECONDS - start))" >> "$out/times.tsv"
}

# On a machine with GPUs: one process each. Without: two gloo processes on the CPU.
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
if [ "$gpus" -gt 0 ] && [ "${CUDA_VISIBLE_DEVICES-unset}" != "" ]; then
  processes=$gpus fsdp2=recipes/accelerate/fsdp2.yaml zero3=recipes/accelerate/zero3.yaml
  [ $((gpus % 2)) -eq 0 ] && ulysses=2 || ulysses=1
else
  processes=2 fsdp2=recipes/accelerate/cpu_fsdp2.yaml zero3=recipes/accelerate/cpu_zero3.yaml ulysses=2
  export OMP_NUM_THREADS=1
fi
models="--detector demo/models/person_detector.onnx --pose demo/models/wholebody133.onnx --segmenter demo/models/person_segmenter.onnx"
small="--num-frames 13 --resolution-area 160*288 --max-clips 2"

step "tiny checkpoint" wan-accel init-tiny animate-14b $out/model
step "training clips" wan-preprocess animate demo/videos/walker.mp4 demo/videos/jumping.mp4 --output $out/clips \
  --purpose train --caption "a person moves in front of the camera" $models $small
step "driving clips" wan-preprocess animate demo/videos/walker.mp4 --output $out/drive \
  --purpose drive --reference demo/reference/man.png --retarget $models $small
step "report" wan-preprocess inspect $out/clips --output $out/report
step "driving report" wan-preprocess inspect $out/drive --output $out/report-drive
step "cache" accelerate launch --config_file "$fsdp2" --num_processes "$processes" -m wan_accel.cache demo/animate_lora
step "train LoRA (FSDP2, Ulysses $ulysses)" accelerate launch --config_file "$fsdp2" --num_processes "$processes" \
  -m wan_accel.train demo/animate_lora parallel.ulysses=$ulysses
step "train full (ZeRO-3)" accelerate launch --config_file "$zero3" --num_processes "$processes" \
  -m wan_accel.train demo/animate_full
step "export LoRA" wan-accel export $out/lora --layout diffsynth --output $out/lora.safetensors
step "export full" wan-accel export $out/full --layout original --output $out/full-export
step "reload LoRA" python -m wan_accel.evaluate demo/animate_lora parallel.ulysses=1 --lora $out/lora.safetensors \
  --output $out/reloaded-lora.json
step "reload full" python -m wan_accel.evaluate demo/animate_full model.checkpoint=$out/full-export \
  --output $out/reloaded-full.json
python demo/summary.py $out

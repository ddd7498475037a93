#!/usr/bin/env bash
# All of vitscale in a few minutes, on one machine, with or without GPUs: data, pretraining on
# several processes, a kill, resuming on another number of processes, export, fine-tuning at
# another resolution, and evaluation before and after. A second run reuses what is there.
#   bash launch/quickstart.sh
set -euo pipefail
case "${1:-}" in
'') ;;
-h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
*) echo "error: launch/quickstart.sh takes no arguments, and was given $*; leave them out" >&2 && exit 2 ;;
esac
if [ "$(uname)" != Linux ]; then
    echo "vitscale is tested on Linux only: on Windows it does not start (no fcntl, fork or pread; WSL 2 is" \
        "untested), and on macOS nobody has tried it." >&2
    exit 2
fi
case "${CUDA_VISIBLE_DEVICES:-}" in
*GPU-* | *MIG-*)
    echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has names, and the deepspeed launcher takes numbers" \
        "only; write those that nvidia-smi -L lists, like 0,1" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }

say "1. Install into .venv"
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
run=runs/quickstart
launcher=(deepspeed --log_level error --master_port "${MASTER_PORT:-29517}")
# The most processes up to $1 that share the lanes evenly: digits.toml has 60, and shapes.toml 120.
sharing() {
    local number=$1
    while ((60 % number)); do number=$((number - 1)); done
    echo "$number"
}
# The launcher's option for $1 processes: on the first of the visible GPUs, or on the CPU.
devices() {
    local visible=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
    if [ "$gpus" -gt 0 ]; then
        echo "--include=localhost:$(cut -d, -f"1-$1" <<<"$visible")"
    else
        echo "--num_accelerators=$1"
    fi
}
processes=$(sharing $((gpus > 0 ? gpus : 2)))
others=$(sharing $((processes > 1 ? processes / 2 : 1)))

say "2. Make the demo data: 14,500 drawn shapes and 1,797 real handwritten digits"
python tools/data.py demo data/demo

if [ ! -e "$run/pretrain/checkpoints/latest" ]; then
    say "3. Pretrain on $processes processes, and kill them all (SIGKILL) half-way"
    # setsid: one process group, so that the kill hits the launcher, ranks and data workers at once.
    setsid "${launcher[@]}" "$(devices "$processes")" launch/train.py configs/demo/shapes.toml &
    job=$!
    until [ -e "$run/pretrain/checkpoints/step-000000300" ] || ! kill -0 "$job" 2>/dev/null; do sleep 0.2; done
    kill -KILL -- "-$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
    python tools/checkpoint.py list "$run/pretrain"
fi

say "4. Resume where it stopped, now with $others: the same command, no conversion"
"${launcher[@]}" "$(devices "$others")" launch/train.py configs/demo/shapes.toml

say "5. Export the weights to one safetensors file"
python tools/checkpoint.py export "$run/pretrain" "$run/pretrain.safetensors" --format safetensors

say "6. Fine-tune on the real digits, at 48 pixels instead of 32"
"${launcher[@]}" "$(devices "$processes")" launch/train.py configs/finetune/digits.toml

say "7. Evaluate a checkpoint by hand: frozen features and ten labelled digits of each class"
python tools/evaluate.py fewshot "$run/finetune" --data data/demo/digits --shots 10 --json "$run/fewshot.json"

say "Results"
python tools/report.py "$run/pretrain" "$run/finetune"
for stage in pretrain finetune; do python tools/report.py "$run/$stage" --out "$run/$stage.html"; done
cat <<END

Look at the runs:     open $run/pretrain.html and $run/finetune.html in a browser
See the curves:       .venv/bin/tensorboard --logdir $run
Look at a checkpoint: .venv/bin/python tools/checkpoint.py show $run/pretrain
Your own photographs: docs/data.md#your-own-images, with configs/starter.toml
What a config runs:   .venv/bin/python launch/train.py configs/demo/shapes.toml --dry-run
END

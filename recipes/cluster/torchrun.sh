#!/bin/sh
# All steps on NODES nodes with GPUS devices each; start it on every node. RANK0: the name of the first node.
set -eu
NODES=${NODES:-1} GPUS=${GPUS:-8} RANK0=${RANK0:-localhost} CONFIG=${CONFIG:-recipes/cluster/train.yaml}
LLM=${LLM:-meta-llama/Llama-3.1-8B-Instruct} MANIFEST=${MANIFEST:-data/train.jsonl} OUT=${OUT:-runs/large-v3-8b}
SUITE=${SUITE:-tiny} # its speech must be there: make eval-data
trap : TERM          # torchrun gets it too, and this shell must live until the processes have saved
launch() {           # restarts after a lost process, command …
    restarts=$1
    shift
    torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$restarts" --shutdown-timeout 240 \
        --rdzv-backend c10d --rdzv-id blsp --rdzv-endpoint "$RANK0:29500" -m blsp "$@"
}
launch 3 continue --manifest "$MANIFEST" --out data/continued.jsonl --llm "$LLM" --top-k 32
launch 0 train --config "$CONFIG" --llm "$LLM" --out "$OUT" --dry-run
launch 3 train --config "$CONFIG" --llm "$LLM" --out "$OUT"
launch 0 evaluate --model "$OUT/adapter" --suite "$SUITE" --out "$OUT/evaluation"

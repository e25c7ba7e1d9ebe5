#!/bin/sh
# All steps on NODES nodes with GPUS devices each; start it on every node. RANK0: the name of the first node.
set -eu
NODES=${NODES:-1} GPUS=${GPUS:-8} RANK0=${RANK0:-localhost} CONFIG=${CONFIG:-recipes/cluster/train.yaml}
LLM=${LLM:-meta-llama/Llama-3.1-8B-Instruct} MANIFEST=${MANIFEST:-data/train.jsonl}
launch() {
    torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 3 --rdzv-backend c10d \
        --rdzv-id blsp --rdzv-endpoint "$RANK0:29500" -m blsp "$@"
}
launch continue --manifest "$MANIFEST" --out data/continued.jsonl --llm "$LLM" --top-k 32
launch train --config "$CONFIG" --dry-run
launch train --config "$CONFIG"
launch evaluate --model runs/large-v3-8b/adapter --suite tiny --out results/large-v3-8b

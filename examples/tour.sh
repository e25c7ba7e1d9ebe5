#!/usr/bin/env bash
# The whole way, as you would type it:
#
#   corpora → manifest → continuations (step 1) → speech features → alignment training (step 2) → checkpoint
#   → inference → evaluation, serving
#
# `make tour` walks the same way and explains each stop. This is the way without the guide, on the real speech of
# examples/speech and the embedded default models: about ten minutes on two CPU cores. Run it again and it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
make -s install
PATH="$PWD/.venv/bin:$PATH"

ENCODER=embedded:whisper-tiny.en             # the frozen ears
LLM=embedded:smollm2-135m-instruct           # the frozen mind
RUN=runs/tour.sh
mkdir -p "$RUN"

# corpora → manifest: the recordings in examples/speech come with theirs; `blsp prepare` writes one for a corpus of yours

# manifest → continuations (step 1): how the LLM behaves when it reads
blsp continue --manifest examples/speech/train.jsonl --out "$RUN/continued.jsonl" --llm "$LLM" \
    --behaviours continue:0.5,repeat:0.5 --orders instruction-first:0.5,speech-first:0.5 \
    --top-k 32 --max-new-tokens 40

# → speech features: the frozen encoder hears every clip once
blsp encode --manifest "$RUN/continued.jsonl" --audio-model "$ENCODER" --cache "$RUN/features"

# → alignment training (step 2) → checkpoint: make it behave the same when it listens
blsp train --config examples/tour/cold.yaml --data "$RUN/continued.jsonl" --cache "$RUN/features" --out "$RUN/train"

# → inference: spoken questions in, text out
blsp generate --model "$RUN/train/adapter" --manifest examples/speech/questions.jsonl --out "$RUN/answers.jsonl"
blsp transcribe --model "$RUN/train/adapter" examples/speech/questions/*.opus

# → evaluation, serving: `blsp evaluate --help`
echo "the adapter: $RUN/train/adapter   the answers: $RUN/answers.jsonl   the curves: $RUN/train/curves.png"

#!/usr/bin/env bash
# From a table of sentences that were judged to a bundle that judges others.
#
#   examples/sentiment.sh TABLE OUT [options of finetune]
#
# TABLE is a .tsv, .csv or .jsonl with the columns `text` and `label`, 1 for good and 0 for bad.
set -euo pipefail
table=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

gptrt-export finetune --task classification --from "${BASE:-models/tales}" --data "$table" --out "$out/run" \
  --prompt $'Review: {text}\nSentiment:' \
  --column answer=label --label 1=good --label 0=bad --set prompt_share=0.5 "$@"
gptrt-export convert "$out/run" --out "$out/bundle" --quantize int8 ${CONVERT:-}
gptrt-export evaluate "$out/run" "$out/bundle" --data "$out/run/data/test.jsonl"

python - "$out/bundle" <<'PYTHON'
import sys

from gptrt import Generator

with Generator(sys.argv[1]) as generator:
    for label, probability in generator.classify("a film that is funny , warm and wise"):
        print(f"{label}: {probability:.0%}")
PYTHON

# A file of any size; if this is interrupted, the same command goes on.
gptrt run "$out/bundle" --input "$out/run/data/test.jsonl" --output "$out/judged.jsonl" --limit 100

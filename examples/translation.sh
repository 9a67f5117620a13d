#!/usr/bin/env bash
# From pairs of sentences to a bundle that translates.
#
#   examples/translation.sh TABLE OUT [options of finetune]
#
# TABLE is a .tsv without names: a sentence, a tab, its translation. The embedded model has hardly
# seen another language, and its tokenizer none: so one is made for the pair.
set -euo pipefail
table=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

mkdir -p "$out"
cut -f1,2 "$table" | tr '\t' '\n' > "$out/both.txt"
gptrt-export train --preset translation --data "$out/both.txt" --out "$out/base" --max-steps 0
gptrt-export finetune --task translation --from "$out/base" --data "$table" --out "$out/run" \
  --prompt '{text} =' --column text=1 --column answer=2 --epochs 15 \
  --set batch_size=8 --set optimizer.lr=0.003 --set optimizer.matrix_lr=0.02 "$@"
gptrt-export convert "$out/run" --out "$out/bundle" --quantize int8 ${CONVERT:-}
gptrt-export evaluate "$out/run" "$out/bundle" --data "$out/run/data/test.jsonl" --limit 500

python - "$out/bundle" <<'PYTHON'
import sys

from gptrt import Generator

with Generator(sys.argv[1]) as generator:
    print(generator.translate("I want to go home."))
PYTHON
gptrt run "$out/bundle" --input "$out/run/data/test.jsonl" --output "$out/translated.jsonl" \
  --prefix its_ --limit 100

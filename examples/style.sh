#!/usr/bin/env bash
# From short texts of one kind, verses or recipes or notes, to a bundle that writes like them.
#
#   examples/style.sh TABLE OUT [options of finetune]
#
# TABLE is a .txt with a text a line, or a table with the column `text`. For books and other long
# texts there is `gptrt-export train --from`.
set -euo pipefail
table=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

gptrt-export finetune --task lm --from "${BASE:-models/tales}" --data "$table" --out "$out/run" "$@"
gptrt-export convert "$out/run" --out "$out/bundle" --quantize int8 ${CONVERT:-}
gptrt-export evaluate "${BASE:-models/tales}" "$out/run" "$out/bundle" --data "$out/run/data/test.jsonl"
gptrt generate "$out/bundle" "The" --max-new-tokens 40 --temperature 0.8 --seed 1

#!/usr/bin/env bash
# From texts with their summaries to a bundle that summarizes.
#
#   examples/summaries.sh TABLE OUT [options of finetune]
#
# TABLE is a .jsonl with the columns `source`, a text or a list of its sentences, and `target`, its
# summary or a list of several. A small model writes badly, but judges well which sentence of a text
# would do as its summary: --extract.
set -euo pipefail
table=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."

gptrt-export finetune --task summarization --from "${BASE:-models/tales}" --data "$table" --out "$out/run" \
  --column text=source --column answer=target --epochs 3 "$@"
gptrt-export convert "$out/run" --out "$out/bundle" --quantize int8 ${CONVERT:-}
gptrt-export evaluate "$out/run" "$out/bundle" --data "$out/run/data/test.jsonl" --extract --limit 200

python - "$out/bundle" <<'PYTHON'
import sys

from gptrt import Generator

text = (
    "Networks are trained for a long time. We propose a method that trains them in half of it. "
    "It needs no more memory."
)
with Generator(sys.argv[1]) as generator:
    print(generator.summarize(text))
    print(generator.summarize(text, extract=True))
PYTHON

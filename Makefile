# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check soak tales clean

# CPython's own manual, one paragraph a line: real text that is on every machine.
DEMO_TEXT := from pydoc_data.topics import topics; \
	text = '\n\n'.join(topics[name] for name in sorted(topics)); \
	print('\n'.join(' '.join(part.split()) for part in text.split('\n\n')))

demo: $(VENV)/demo.stamp
	rm -rf demo && mkdir demo
	$(BIN)/python -c "$(DEMO_TEXT)" > demo/topics.txt
	@echo "--- 1 of 4: fine-tune the embedded default for a minute on CPython's own manual"
	$(BIN)/gptrt-export train --from models/tales --data demo/topics.txt --out demo/run --max-time 60
	@echo "--- 2 and 3 of 4: convert to int4 and verify against PyTorch"
	$(BIN)/gptrt-export convert demo/run --out demo/bundle --quantize int4
	@echo "--- 4 of 4: generate, from what it was and from what it has become"
	$(BIN)/gptrt generate "The function" --max-new-tokens 60 --temperature 0.7 --seed 1
	$(BIN)/gptrt generate demo/bundle "The function" --max-new-tokens 60 --temperature 0.7 --seed 1

# One worker a core. A file's tests stay together, for they share what its fixtures made; in the order
# of their names, which happens to begin with the slow ones.
test: check
	$(BIN)/python -m pytest -q -rs -n auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Memory that grows, calls that do not end, files that do harm: minutes.
soak: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.soak

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,export]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,export,dev]'
	touch $@

# Train the embedded default again: BOOKS is a folder of plain-text books with a `valid.list`. Minutes
# on a card; two cores do part of it in two hours: FLAGS="--max-time 7200 --set batch_size=8 --set dropout=0".
tales: $(VENV)/demo.stamp
	$(BIN)/python models/tales_corpus.py $(BOOKS) runs/corpus
	$(BIN)/gptrt-export train --preset tales --data runs/corpus/train --valid runs/corpus/valid --out runs/tales $(FLAGS)
	$(BIN)/gptrt-export convert runs/tales --out models/tales --quantize int8 --hidden-states --force $(TALES_NOTES)

TALES_NOTES := --note "data=103 public-domain English story books (Project Gutenberg), cleaned by models/tales_corpus.py" \
	--note "licence=Apache-2.0; the books are in the public domain in the United States" \
	--note "trained again with=make tales BOOKS=FOLDER"

clean:
	rm -rf $(VENV) demo build dist *.egg-info

"""The soak: what shows only after thousands of times, or only in files that nobody meant to write.

    python -m benchmarks.soak [BUNDLE] [--generations 10000] [--opens 1000] [--cancels 1000]
                              [--fuzz 2000] [--json FILE]
    python -m benchmarks.soak [BUNDLE] --case SEED    # one damaged file again, in this process

Three promises, each checked by a module:

    memory.py   thousands of calls (workload.py) and of openings leave memory as it was
    storm.py    of thousands of cancellations, from other threads, none is lost
    fuzz.py     thousands of damaged files are refused with an error of gptrt's, or change nothing

The fuzz is read from the inside out: damage.py changes any bytes and any JSON, kinds.py knows the
files of a bundle and what is worth breaking in each, harness.py reads one damaged file and judges
what came of it, and fuzz.py has this done in child processes: a crash is a figure, not the end.

report.py makes one table of it all, __main__.py is the command. It is for Linux.
"""

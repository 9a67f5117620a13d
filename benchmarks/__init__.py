"""gptrt beside its peers: `python -m benchmarks run`, from the root of the repository."""

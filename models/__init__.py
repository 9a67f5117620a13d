"""Data of gptrt: the presets for training and the embedded default bundle. No code."""

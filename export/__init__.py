"""The factory: trains or fine-tunes a GPT and turns it into a quantized, verified bundle."""

"""The Generative Pretrained Thoughtformer, its hourglass, and the plain GPT as the uncompressed case."""

"""A byte-level language model in Flax NNX: the model, its data, and the whole trainer."""

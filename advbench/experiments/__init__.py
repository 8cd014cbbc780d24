"""One experiment from its config: train, or evaluate."""

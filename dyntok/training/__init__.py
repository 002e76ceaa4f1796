"""Training of tokenizers (extra `train`): recipes, data, losses, stages and the loop."""

"""Config, shaped network and benchmark of gradient pruning."""

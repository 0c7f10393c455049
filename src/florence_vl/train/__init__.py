"""The training engine: recipes, loop, optimizer, parallelism, checkpoints, metrics."""

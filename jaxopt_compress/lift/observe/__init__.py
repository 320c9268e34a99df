"""What can be seen of a function while it runs: uses, statistics of activations, captures."""

"""What takes tensors out of a live model and its optimiser."""

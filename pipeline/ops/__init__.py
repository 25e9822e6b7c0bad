"""Functions on tensors that methods share. They import nothing else of the project."""

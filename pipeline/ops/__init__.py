"""What methods share: tensors in, tensors out. Imports nothing of the project."""

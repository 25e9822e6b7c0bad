"""Prepared datasets: their format, the readers of raw trees, the split lists, and what makes them."""

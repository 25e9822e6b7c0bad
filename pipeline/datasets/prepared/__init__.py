"""Prepared datasets: shards, index, splits."""

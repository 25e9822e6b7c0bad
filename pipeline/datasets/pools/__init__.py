"""Pools: folders of any number of unlabeled images."""

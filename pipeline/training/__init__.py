"""The trainer, its state and trackers, the checks before it, and the launcher on Ray Train."""

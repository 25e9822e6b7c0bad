"""The loop, its state, its trackers, and the launcher on Ray Train."""

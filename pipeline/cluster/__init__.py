"""The Ray cluster: joining or starting it, its nodes, tasks and jobs on it."""

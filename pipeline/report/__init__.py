"""From what a run left behind to tables and pictures."""

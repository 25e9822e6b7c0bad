"""What a run can be told: the dataclasses, and the way from YAML and flags to them."""

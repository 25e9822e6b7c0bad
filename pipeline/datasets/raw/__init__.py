"""What comes from outside: trees, masks and class lists of others."""

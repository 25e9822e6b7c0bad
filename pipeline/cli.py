"""The command line: flags from the config's dataclasses, and exit codes (0 done, 2 user error, 1 failure)."""

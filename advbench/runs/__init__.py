"""Run directories: what is in one, which is the same run, and what made it."""

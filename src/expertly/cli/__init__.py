"""The door: one file per verb. Each parses, imports its job when called, and prints the result."""

"""Generation: from a prompt to text."""

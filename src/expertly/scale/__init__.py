"""More than one device: what ranks tell each other."""

"""The nouns: data and state tables without I/O. Everything above speaks in these words."""

"""One policy a file: its source, its equation, what it promises. Standard library and `policies` only."""

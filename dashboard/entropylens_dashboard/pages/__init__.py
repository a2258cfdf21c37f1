"""The pages: each says how it is laid out and what its callbacks do."""

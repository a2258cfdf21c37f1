"""One file a quantity: pure tensor functions and the registered class under them."""

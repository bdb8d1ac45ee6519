"""What is known from labels alone."""

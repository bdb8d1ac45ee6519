"""What turns features into one score per class."""

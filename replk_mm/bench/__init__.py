"""Published numbers, and ours beside them. A number is either quoted or measured, and says which."""

"""Checks of data sets: the same ones for a training, on a sample of the files, and for ``tools/check_data.py``."""

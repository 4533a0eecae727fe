"""Hostile input for everything that reads data from outside: ``python tests/fuzz/run.py READER --executions N``."""

"""Suites: what they name is trained and measured row by row, each in a process of its own, and recorded."""

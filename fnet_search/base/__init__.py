"""Shared foundations: errors, files, units, TOML tables, plug-ins, shipped data, terminal tables.

Belongs here: what every room may need. Uses the standard library and rich, and nothing else of this package.
Read first: `errors.py`.
"""

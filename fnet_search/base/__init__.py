"""What every room needs and what needs no other: errors, files, units, TOML tables, plug-ins, shipped data, terminal.

Comes in: Standard library, click's and rich's output only; nothing of this package.
Read first: `errors.py`.
"""

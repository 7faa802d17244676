"""Spaces by name, and torch modules as macroarchitectures.

Comes in: Everything that turns what others made into a `Macroarchitecture`.
Read first: `spaces.py`.
"""

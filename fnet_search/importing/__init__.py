"""Spaces by name, and torch modules as macroarchitectures.

Belongs here: everything that makes a `Macroarchitecture` of a network defined elsewhere.
Read first: `spaces.py`.
"""

"""The command line: one file a group of commands, and options that several have.

Belongs here: Click commands, which import heavy modules when they run.
Read first: `main.py`.
"""

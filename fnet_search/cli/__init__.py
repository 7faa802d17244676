"""The command line: a file for each group of commands, and the options that several commands share.

Belongs here: Click commands, which import heavy modules when they run.
Read first: `main.py`.
"""

"""The run folder: its files, and recorded runs.

Belongs here: paths, formats, and what reads and writes them.
Read first: `run_folder.py`.
"""

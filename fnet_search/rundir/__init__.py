"""The run folder: its files, and a recorded run opened again.

Belongs here: paths, formats, and what reads and writes them.
Read first: `run_folder.py`.
"""

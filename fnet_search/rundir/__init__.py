"""The run folder: its files, and a recorded run opened again.

Comes in: Paths, formats and what reads them.
Read first: `run_folder.py`.
"""

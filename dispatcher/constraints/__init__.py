"""Checks of structured outputs before any engine sees them, each with a time limit.

`checker.py` asks a child process (`process.py`), `size.py` judges without vLLM, `pending.py` keeps the inbox
entries that wait for a verdict. Begin with `checker.py`.
"""

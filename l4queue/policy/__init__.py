"""Decisions about one request or one worker, as pure functions: values in, a decision with a reason out.

Imports `cost` and models; no clock, no I/O, no random state. Workers, dispatchers and the simulator call the
same functions. Begin with `route.py` (where), `admission.py` (when), `steal.py` and `handover.py` (moves).
"""

"""Reports of a worker: the observer interface, metrics, traces. Reads the worker, never changes it.

`workers.loop` and `workers.host` use it. Begin with `observer.py`.
"""

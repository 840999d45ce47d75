"""Reports of a worker: the observer interface, metrics, traces. Reads the worker, never changes it."""

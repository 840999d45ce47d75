"""GPU workers: an engine, the loop around it, and the Celery worker that hosts both.

`__main__.py` starts one, `worker_group.py` several emulated ones, `build.py` puts a worker together. Packages:
`loop` (take, generate, write, move), `engine` (vLLM and emulated), `kv` (hand-over of KV caches), `host`
(Celery), `telemetry`, `process`. Begin with `loop/worker.py`.
"""

"""Hand-over of KV caches between the engines of one host, through files in shared memory.

Split as in vLLM: `frontend.py` (tickets), `scheduler.py` (which request saves or loads), `copier.py` (the copy).
Knows neither Redis nor `workers.loop`. Begin with `frontend.py`; docs/kv-handover.md tells the way of a cache.
"""

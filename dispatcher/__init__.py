"""Services beside the workers: dispatcher, planner, Flower, metrics exporter.

`__main__.py` starts a dispatcher, `app.py` is the planner's Celery app, `flower.py` and `exporter.py` start
those services. Packages: `routing`, `constraints`, `planner`, `monitoring`. Begin with `routing/service.py`.
"""

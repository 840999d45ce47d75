"""The Celery worker around the engine: bootsteps, task events for Flower, remote control.

Celery carries control and events here, never requests. Begin with `bootsteps.py`.
"""

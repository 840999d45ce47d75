"""Planning rounds on a live deployment: Celery tasks around `rounds.py`. The policy is `l4queue.planning`."""

"""Prometheus metrics of the deployment as a whole, and Flower's bounded intake of events.

Imports `l4queue.observe`; the exporter and Flower use it. Begin with `families.py`.
"""

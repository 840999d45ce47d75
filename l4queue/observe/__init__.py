"""Read-only views of a deployment: overview, timeline of a request, monitoring data, signs of life.

Imports `protocol` and everything below it; writes nothing but signs of life. Begin with `overview.py`.
"""

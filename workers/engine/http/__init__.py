"""The engine of a server that is already running, driven by token ids over HTTP.

Begin with `engine.py`. `connection.py` talks to the server, `translate.py` has its terms, `gauges.py` reads its
metrics, `arrivals.py` estimates its steps.
"""

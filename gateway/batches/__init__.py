"""Files and batches of OpenAI's API: state in Redis, contents in a store, run by the batch core of the client.

Any gateway of a deployment runs any batch, one at a time by a lease. Begin with `runner.py` and `execution.py`.
"""

"""`l4queue bench serve`: routing policies compared on running engines. Begin with `command.py`."""

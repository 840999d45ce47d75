"""`l4queue stats --watch`: looks (`command.py`), values (`window.py`), layout (`view.py`)."""

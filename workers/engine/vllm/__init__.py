"""The vLLM engine, unpatched and in process. Begin with `engine.py`; only this package imports vllm lazily."""

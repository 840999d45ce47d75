"""The HTTP gateway: vLLM's own OpenAI server over the queue. Begin with `engine.py`.

Nothing else needs it. It runs no engine: `QueueEngine.generate` enqueues token ids and reads the output stream.
"""

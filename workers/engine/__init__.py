"""Inference engines behind one seam, `base.py`: token ids in, token ids out.

Knows neither Redis nor `workers.loop`. A new engine implements `base.Engine`, like `vllm/`, `http/` and
`emulated/`, and is built in `workers/build.py`.
"""

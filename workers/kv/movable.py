"""Whether the KV cache of a model can be moved by this package, and its size per token."""

from __future__ import annotations

from typing import Any

__all__ = ("has_movable_groups", "kv_bytes_per_token")


def kv_bytes_per_token(config: Any) -> int:
    """Bytes of all layers by vLLM's `VllmConfig`; 0 when it cannot be moved.

    Moved are models with full attention in every layer, on one device: 2 · layers · KV heads · head size · bytes
    per value, or layers · compressed size · bytes per value for latent attention (MLA).
    """
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    has_state = model.is_hybrid or model.is_attention_free or model.get_sliding_window() is not None
    if has_state or parallel.world_size != 1:
        return 0
    dtype = model.dtype if cache.cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache.cache_dtype]
    value_bytes = torch.empty((), dtype=dtype).element_size()
    per_head = model.get_head_size() if model.use_mla else 2 * model.get_head_size()
    heads = 1 if model.use_mla else model.get_num_kv_heads(parallel)
    return int(model.get_num_layers(parallel) * heads * per_head * value_bytes)


def has_movable_groups(kv_cache_config: Any) -> bool:
    """Whether the engine keeps all blocks of a request in one group: full attention in every layer."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        return False
    spec = groups[0].kv_cache_spec
    return spec.sliding_window is None and getattr(spec, "attention_chunk_size", None) is None

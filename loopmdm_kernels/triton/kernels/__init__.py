"""Device code by op. Offsets into tensors are 64-bit, sums fp32; the order of programs does not matter.

`head_logits` has no kernel of its own: it is `modulated_rows`, then `linear`.
"""

"""The ops as the reference computes them: the oracle of the tests, whatever backend is in use."""

import loopmdm_kernels as lk

attention = lk.use_backend("reference")(lk.attention)
head_logits = lk.use_backend("reference")(lk.head_logits)
looped_blocks = lk.use_backend("reference")(lk.looped_blocks)
masked_cross_entropy = lk.use_backend("reference")(lk.masked_cross_entropy)
sample_rows = lk.use_backend("reference")(lk.sample_rows)

"""Facts about a GPU, and what the Triton kernels would take of one: no op is timed here."""

"""What studies share: their folder, models and held-out data, traces, scores and figures."""

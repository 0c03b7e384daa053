"""What more loops give in likelihood, samples and boards."""

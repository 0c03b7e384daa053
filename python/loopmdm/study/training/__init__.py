"""Models trained side by side on one budget."""

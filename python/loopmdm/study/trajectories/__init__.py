"""What single tokens and boards do from loop to loop."""

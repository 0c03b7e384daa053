"""What single tokens and boards do from loop to loop."""

CONTEXT = 9  # positions shown on either side of a token

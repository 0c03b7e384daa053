"""The Triton ops as a kernel of the Hugging Face Hub: `python -m examples.hub FOLDER` (docs/packages.md)."""

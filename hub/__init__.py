"""The Triton ops as a kernel of the Hugging Face Hub: `python -m hub FOLDER` (docs/hub.md)."""

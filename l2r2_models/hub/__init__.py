"""Publishing to the Hugging Face Hub: model cards, checks, and the upload of checkpoints and kernels."""

"""Evaluation: stored branch logits, fusions fitted on them, and metrics (`docs/method.md`, section 9)."""

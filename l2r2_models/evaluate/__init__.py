"""Judging: stored branch logits, the fusions that are fitted on them, and the measures of `docs/method.md`, section 9."""

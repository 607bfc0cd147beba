"""Fine-tuning: recipes, the training loop, and the run folder it writes."""

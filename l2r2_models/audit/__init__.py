"""Background audit: measure how much a classifier relies on the background, by changing images."""

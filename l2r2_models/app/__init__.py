"""A page in the browser: photo, box, predictions and their reasons, saliency, and other backgrounds."""

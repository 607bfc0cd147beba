"""Prediction: from an image or a folder to classes, boxes and reasons."""

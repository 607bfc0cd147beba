"""Ways to a box, behind one protocol: prompted detectors, segmenters, the backbone itself, a trained head, and controls."""

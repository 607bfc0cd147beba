"""Data sets: reading a folder as a table, splits, augmentation, and composites of objects and backgrounds."""

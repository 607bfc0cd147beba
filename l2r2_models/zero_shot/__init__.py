"""Zero-shot L2R2: the image tower of a vision-language model sees the views, and the class names give the heads."""

"""Classify a photo with an exported model, without PyTorch. Needs numpy, pillow and onnxruntime.

l2r2 export runs/fungi --input image -o fungi.onnx
python run_onnx.py fungi.onnx photo.jpg 130 42 410 380      # the object's box in pixels: left, top, right, bottom
python run_onnx.py fungi.onnx photo.jpg                     # without a box, uses the whole image
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) not in (3, 7):
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
if metadata.get("input") != "image":
    sys.exit(f"{sys.argv[1]}: takes views, not images; export it with --input image.")
labels = json.loads(metadata["labels"])

image = ImageOps.exif_transpose(Image.open(sys.argv[2]))
if image.mode not in ("RGB", "L", "P") or "transparency" in image.info:
    sys.exit(f"{sys.argv[2]}: {image.mode} is not 8-bit RGB or gray without transparency; convert it, or use `l2r2 predict`.")
image = image.convert("RGB")
box = [float(v) for v in sys.argv[3:]] or [np.nan] * 4
outputs = session.run(None, {"image": np.asarray(image), "boxes": np.asarray([box], np.float32)})

for name, logits in zip((output.name for output in session.get_outputs()), outputs):
    if name == "has_fg":
        continue
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    best = int(probabilities.argmax())
    print(f"{name:6} {labels[best]} {probabilities[best]:.4f}")

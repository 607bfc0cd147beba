"""How the Hub names repositories and describes files."""

import hashlib


def key_of(kind: str, name: str) -> str:
    return name if kind == "models" else f"{kind}/{name}"


def entry_of(path: str, content: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx"))

"""Writers of exported models, one for each file format; each returns how the written file is run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error

Run = Callable[[tuple[Tensor, ...]], Sequence[Any]]  # from the inputs to the outputs, as PyTorch tensors or NumPy arrays


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: the format's own name.
        write: `write(module, inputs, file, metadata)` writes the file, in an empty folder, and returns how to run it, or None
            where this machine cannot.
        extra: the extra with its packages, if it needs any.
        packages: import names of these packages.
        dynamic: whether the sizes of inputs may vary; otherwise, a file takes the views of one image.
    """

    name: str
    write: Callable[[Any, tuple[Tensor, ...], Path, dict[str, str]], Run | None]
    extra: str | None = None
    packages: tuple[str, ...] = ()
    dynamic: bool = True

    def check_packages(self, out: Path) -> None:
        """Raise an error if a package that writing `out` needs is missing."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise L2R2Error(f'{out}: {self.name} needs {", ".join(missing)}: pip install "l2r2-models[{self.extra}]".')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress output and deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "coremltools")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _program(module: Any, inputs: tuple[Tensor, ...], dynamic: bool = True) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(module.dynamic_shapes(),) if dynamic else None)


def _write_torch(module: Any, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]) -> Run:
    with _quiet():
        torch.export.save(_program(module, inputs), file, extra_files={"l2r2.json": json.dumps(metadata)})
        loaded = torch.export.load(file).module()
    return lambda values: loaded(*values)


def _save_onnx(module: Any, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]) -> None:
    with _quiet():
        program = torch.onnx.export(
            _program(module, inputs), dynamo=True, input_names=list(module.inputs), output_names=list(module.outputs)
        )
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(str(file), external_data=False)


def _write_onnx(module: Any, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]) -> Run:
    import onnxruntime

    _save_onnx(module, inputs, file, metadata)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, {name: value.numpy() for name, value in zip(module.inputs, values)})


def _write_openvino(module: Any, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]) -> Run:
    """Write OpenVINO's XML and, next to it, the weights (.bin), by way of ONNX, which keeps the names of inputs and outputs."""
    import openvino

    through = file.with_suffix(".onnx")
    _save_onnx(module, inputs, through, metadata)
    core = openvino.Core()
    openvino.save_model(core.read_model(str(through)), str(file), compress_to_fp16=False)  # convert_model would send telemetry
    through.unlink()
    model = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bf16 by default on new CPUs

    def run(values: tuple[Tensor, ...]) -> Sequence[Any]:
        answers = model([value.numpy() for value in values])
        return [answers[name] for name in module.outputs]

    return run


def _write_coreml(module: Any, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]) -> Run | None:
    """Write an ML program for one image. Core ML has no bool inputs, so `has_fg` is a number, 0 or 1."""
    with _quiet():
        import coremltools

        program = _program(module, inputs, dynamic=False).run_decompositions({})
        model = coremltools.convert(
            program,
            inputs=[coremltools.TensorType(name=name, shape=tuple(value.shape)) for name, value in zip(module.inputs, inputs)],
            outputs=[coremltools.TensorType(name=name) for name in module.outputs],
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.precision.FLOAT32,
        )
        model.user_defined_metadata.update(metadata)
        model.save(str(file))
    if sys.platform != "darwin":
        return None

    def run(values: tuple[Tensor, ...]) -> Sequence[Any]:
        answers = model.predict({name: value.float().numpy() for name, value in zip(module.inputs, values)})
        return [answers[name] for name in module.outputs]

    return run


FORMATS = {
    ".onnx": Format("ONNX", _write_onnx, "export", ("onnx", "onnxscript", "onnxruntime")),
    ".xml": Format("OpenVINO", _write_openvino, "openvino", ("openvino", "onnx", "onnxscript")),
    ".mlpackage": Format("Core ML", _write_coreml, "coreml", ("coremltools",), dynamic=False),
    ".pt2": Format("torch.export", _write_torch),
}

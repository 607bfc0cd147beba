"""Options shared by several commands, with the same name and meaning everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

DATA = typer.Argument(help="Data set: one folder per class, a folder with metadata.csv or .jsonl, or hf:ORG/NAME.")
Data = Annotated[Path, DATA]
Run = Annotated[str, typer.Argument(help="Run folder, a Hub id (ORG/NAME), or vlm:MODEL?names=FILE (zero-shot).")]
Boxes = Annotated[
    Optional[Path],
    typer.Option(
        "--boxes",
        help="Box file (MegaDetector, COCO, Label Studio, CVAT, CSV, Parquet), or a folder of Parquet, YOLO, VOC, LabelMe.",
        show_default="the boxes in the metadata",
    ),
]
Split = Annotated[Optional[str], typer.Option("--split", help="Use only this split of the data set.", show_default="all")]
Group = Annotated[
    Optional[str], typer.Option("--group", help="Metadata column: also report accuracy per value, and the worst value.")
]
Metadata = Annotated[
    Optional[Path], typer.Option("--metadata", help="Metadata file to use instead of the one in the data folder.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip images that cannot be used instead of stopping.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch.")]
Workers = Annotated[
    Optional[int],
    typer.Option(
        "--workers",
        min=0,
        help="Workers that load images in advance; 0 for none.",
        show_default="one per core",
    ),
]
Precision = Annotated[
    str,
    typer.Option("--precision", help="Precision of the network: fp32, or bf16, which is faster and less precise."),
]
Cascade = Annotated[
    Optional[float],
    typer.Option(
        "--cascade",
        help="Classify the object first, and the whole image only where the object is uncertain; loses at most this accuracy, in "
        "percentage points. 0: where the whole image could change the prediction; labels and scores stay the same. More than 0: "
        "fitted by `l2r2 fuse --cascade`.",
        show_default="off",
    ),
]
Device = Annotated[
    Optional[str], typer.Option("--device", help="Device to compute on: cpu, cuda, ...", show_default="cuda if available")
]
Localizer = Annotated[
    Optional[str],
    typer.Option(
        "--localizer",
        help="What finds the boxes: camera-trap, prompt, none, or another of `l2r2 localize`; head, mask-head: the model's own.",
    ),
]
MaxObjects = Annotated[int, typer.Option("--max-objects", min=1, help="Boxes to classify per image, best first.")]
Top = Annotated[int, typer.Option("--top", min=1, help="Classes to list per object.")]
Engine = Annotated[
    str, typer.Option("--engine", help="local, or ray: on a Ray cluster, for more images than one machine can take.")
]
Address = Annotated[
    Optional[str], typer.Option("--address", help="Ray cluster to use.", show_default="$RAY_ADDRESS, else this machine")
]
Format = Annotated[
    Optional[str],
    typer.Option(
        "--format",
        help="Format of the file: json, jsonl, csv, parquet, megadetector (1.6, for Timelapse) or coco.",
        show_default="by its ending",
    ),
]
Host = Annotated[str, typer.Option("--host", help="Interface to listen on; the default is this machine alone.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Largest width * height of an image.")]
Method = Annotated[
    str, typer.Option("--method", help="gradcam, ig, occlusion, rollout (plain ViTs), parts (iFAM models) or auto.")
]
Prior = Annotated[
    Optional[Path],
    typer.Option("--prior", help="JSON file of `l2r2 prior fit`: correct the predictions by the metadata of each image."),
]
Classes = Annotated[
    Optional[str],
    typer.Option(
        "--classes", help="The possible classes: comma-separated names, or a file with one per line.", show_default="all"
    ),
]
Geofence = Annotated[
    Optional[Path],
    typer.Option("--geofence", help="CSV with the columns class and region: where each class occurs, for --region."),
]
Region = Annotated[Optional[str], typer.Option("--region", help="Only classes of this region of --geofence are possible.")]
Taxonomy = Annotated[
    Optional[Path],
    typer.Option("--taxonomy", help="CSV with the groups of each class, from narrow to broad, for --rollup."),
]
Rollup = Annotated[
    Optional[float],
    typer.Option(
        "--rollup", help="Probability that a class needs; else the narrowest group of --taxonomy that reaches it is named."
    ),
]
Abstain = Annotated[
    Optional[float],
    typer.Option(
        "--abstain",
        help="Withhold predictions of low confidence, for this risk (error rate); see `l2r2 fuse --abstain-risk`.",
    ),
]
Report = Annotated[Optional[Path], typer.Option("--report", help="Write a report to this HTML file.")]
Explanations = Annotated[
    Optional[Path],
    typer.Option("--explanations", help="Page of `l2r2 explain` to which the images of the report link."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def box_threshold(default: str | bool) -> Any:
    """Make the option `--box-threshold` with this displayed default."""
    return typer.Option("--box-threshold", min=0, max=1, help="Ignore boxes with a lower score.", show_default=default)

"""Extract the frames of videos that a MegaDetector file lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..boxes import BoxEntry, BoxTable
from ..boxes.megadetector import frame_name
from ..errors import L2R2Error
from ..images import is_image_path
from ..io import write_atomic

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".wmv", ".webm", ".mts", ".3gp"))
QUALITY = 95  # of the JPEG files


def extract_frames(
    sources: Sequence[Path],
    table: BoxTable,
    folder: Path,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, _: items,
) -> list[Path]:
    """Write the frames with a box as images, as MegaDetector's `video_to_frames` names them.

    Of a video without a box, the first frame is written, so that it is listed too. Frames that exist are kept.

    Args:
        sources: images, videos, and folders of them.
        table: box file with frames of the videos; its paths are joined to the videos as to images.
        folder: folder to write to.
        progress: wraps the videos; takes their iterable and their number.

    Returns:
        The sources without those that are or contain only videos, and the frames of the videos.

    Raises:
        L2R2Error: when there is no video, the box file lists none of the videos, a video cannot be read or has fewer frames, or
            PyAV is missing.
    """
    videos = [path for source in sources for path in _inside(source, is_video_path)]
    if not videos:
        raise L2R2Error(f"{', '.join(map(str, sources))}: no video for --frames (looked for {' '.join(sorted(VIDEO_SUFFIXES))}).")
    numbers: dict[str, list[int]] = {}
    for key, frame in table.frames.items():
        numbers.setdefault(frame.video, [])
        if table.entries[key].boxes:
            numbers[frame.video].append(frame.number)
    firsts = {frame.video: frame.number for frame in reversed(table.frames.values())}
    if not numbers:
        raise L2R2Error(f"{table.source}: lists no frames of videos; --frames needs MegaDetector's output for videos.")
    keys = BoxTable({video: BoxEntry() for video in numbers}, table.source).keys_of(videos)
    found: list[Path] = []
    for video, key in progress(keys.items(), len(keys)):
        wanted = {number: folder / _relative(frame_name(key, number)) for number in numbers[key] or [firsts[key]]}
        _extract(Path(video), {number: place for number, place in wanted.items() if not place.exists()})
        found += wanted.values()
    only_videos = {source for source in sources if _inside(source, is_video_path) and not _inside(source, is_image_path)}
    return [source for source in sources if source not in only_videos] + found


def is_video_path(path: Path) -> bool:
    """Whether a relative path has a video suffix and no hidden part."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") and part != ".." for part in path.parts)


def _inside(source: Path, fits: Callable[[Path], bool]) -> list[Path]:
    """Return the fitting files of a folder, or the file itself."""
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if fits(path.relative_to(source)) and path.is_file())
    return [source] if fits(Path(source.name)) else []


def _relative(name: str) -> PurePosixPath:
    """Make a path relative, without steps upward."""
    return PurePosixPath(*(part.rstrip(":") for part in PurePosixPath(name).parts if part not in ("/", "..")))


def _extract(video: Path, wanted: Mapping[int, Path]) -> None:
    """Write frames of a video by number, upright.

    Raises:
        L2R2Error: when the video cannot be read, or ends before the last of them.
    """
    if not wanted:
        return
    try:
        import av
    except ImportError as error:
        raise L2R2Error('--frames needs one more package: pip install "l2r2-models[video]".') from error
    left = dict(wanted)
    try:
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if (place := left.pop(number, None)) is not None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    image = frame.to_image().rotate(frame.rotation, expand=True)
                    write_atomic(place, lambda path: image.save(path, "JPEG", quality=QUALITY))  # noqa: B023
                if not left:
                    return
    except (av.FFmpegError, OSError, IndexError) as error:
        raise L2R2Error(f"{video}: cannot be read as a video ({error}).") from error
    raise L2R2Error(f"{video}: has no frame {min(left)}, which the box file lists; use boxes made for this video.")

"""Files on this machine and in object stores, through the file systems of pyarrow.

Credentials come from the configuration of the file system alone (environment, profile or role), never from a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import L2R2Error
from ..images import ImageError, is_image_path
from ..io import MAX_BYTES, pyarrow, write_bytes

State = tuple[int, int]  # size in bytes, and modification time in nanoseconds
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(.+)")  # Path collapses the slashes


def url_of(path: str | Path) -> str | None:
    """Return a path as URL, or None if it is a path of this machine.

    >>> url_of(Path("s3://bucket/photos")), url_of("C:/photos"), url_of("hf:org/name")
    ('s3://bucket/photos', None, None)
    """
    if (match := _URL.fullmatch(str(path))) is None or str(path).startswith("hf:"):
        return None
    scheme, rest = match.groups()
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


@dataclass(frozen=True)
class Place:
    """A file or folder in a file system of pyarrow.

    Attributes:
        filesystem: the file system.
        path: path in it.
        prefix: what makes a path in it a URL again; empty for this machine.
    """

    filesystem: Any
    path: str
    prefix: str = ""

    @classmethod
    def of(cls, name: str | Path) -> Place:
        """Find the file system of a path or URL.

        Raises:
            L2R2Error: when the URL contains credentials, its scheme is unknown, or pyarrow is missing.
        """
        pa, _ = pyarrow()
        from pyarrow import fs

        if (url := url_of(name)) is None:
            return cls(fs.LocalFileSystem(), str(Path(name).absolute()))
        if re.match(r"[^/]+//[^/]*@", url):
            raise L2R2Error(
                f"{url.split('//')[0]}//...: contains credentials; configure them in the environment or a profile instead."
            )
        try:
            found, path = fs.FileSystem.from_uri(url)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise L2R2Error(f"{url}: is no place that pyarrow can open ({' '.join(str(error).split())[:200]}).") from None
        return cls(found, path, url.split("://")[0] + "://")

    def __str__(self) -> str:
        return self.prefix + self.path

    @property
    def local(self) -> bool:
        """Whether the place is on this machine, or mounted there."""
        return bool(self.filesystem.type_name == "local")

    def child(self, name: str) -> Place:
        """Return a file in this folder."""
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.prefix)

    def files(self) -> Iterator[tuple[Place, State]]:
        """Yield the file, or the files in the folder and below, sorted, without hidden ones; nothing if there is no such place.

        Raises:
            L2R2Error: when it cannot be listed.
        """
        from pyarrow import fs

        try:
            (about,) = self.filesystem.get_file_info([self.path])
            listed = [about]
            if about.type == fs.FileType.Directory:
                listed = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True))
        except (OSError, ValueError) as error:
            raise L2R2Error(f"{self}: cannot be listed ({' '.join(str(error).split())[:200]}).") from None
        for file in sorted((f for f in listed if f.type == fs.FileType.File), key=lambda f: PurePosixPath(f.path).parts):
            inside = PurePosixPath(file.path).parts[len(PurePosixPath(self.path).parts) :]
            if not any(part.startswith(".") for part in inside):
                yield Place(self.filesystem, file.path, self.prefix), (file.size or 0, file.mtime_ns or 0)

    def images(self) -> Iterator[tuple[Place, State]]:
        """Yield the image files as `files` does; a file that is named explicitly is one whatever its suffix."""
        for file, state in self.files():
            if file.path == self.path or is_image_path(Path(file.path).relative_to(self.path)):
                yield file, state

    def read(self) -> bytes:
        """Read an image file.

        Raises:
            ImageError: when it cannot be read or is too large.
        """
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise ImageError(f"{self}: no such file.") from None
        except (OSError, ValueError) as error:
            raise ImageError(f"{self}: cannot be read ({' '.join(str(error).split())[:200]}).") from None
        if len(data) > MAX_BYTES:
            raise ImageError(f"{self}: is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file.")
        return bytes(data)

    def write(self, data: bytes) -> None:
        """Write a file in one step, and the folder that it is in.

        Raises:
            L2R2Error: when it cannot be written.
        """
        if self.local:
            write_bytes(self.path, data)
            return
        try:
            with self.filesystem.open_output_stream(self.path) as stream:  # an object appears when its stream is closed
                stream.write(data)
        except (OSError, ValueError) as error:
            raise L2R2Error(f"{self}: cannot be written ({' '.join(str(error).split())[:200]}).") from None

    def delete(self) -> None:
        """Delete a file."""
        self.filesystem.delete_file(self.path)

"""Videos of what an environment shows."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from dreamerv3_jax.envs import Records, VectorEnvironment
from dreamerv3_jax.errors import UserError, one_line

GIF_FRAME_RATE = 50.0  # browsers slow down what is faster
LEAST_SIDE = 256  # pixels of a video; smaller pictures are enlarged
MOST_GIF_BYTES = 1_000_000_000  # of pictures, which imageio keeps until the last


class Film:
    """A video file, opened when the first picture comes; without a path it takes none."""

    def __init__(self, path: Path | None) -> None:
        """Prepares; nothing is written yet.

        Raises:
          UserError: the package that writes videos is missing.
        """
        self.running = path is not None
        self._path = path
        self._writer: Any = None
        self._buffer: io.BytesIO | None = None  # of a .gif
        self._bytes = 0  # of all pictures
        self.frame_rate = 0.0  # pictures per second, set before the first
        if path is not None:
            # pygame, which many environments draw with, needs no screen then.
            os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
            try:
                import imageio

                self._open = imageio.get_writer
            except ImportError as error:
                raise UserError(
                    'Videos need imageio; in the clone, pip install -e ".[video]".'
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Completes the file; a .gif is written here only. May be called again.

        Raises:
          UserError: the file cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            assert self._path is not None
            with self._writing():
                writer.close()
                if self._buffer is not None:
                    self._path.write_bytes(self._buffer.getvalue())
                elif self._path.suffix == '.mp4' and not _complete(self._path):  # ffmpeg is silent
                    raise OSError('ffmpeg did not complete it; is the disk full?')

    def add(self, picture: np.ndarray) -> None:
        """Appends [H, W, 3] `uint8`.

        Raises:
          UserError: the file cannot be written.
        """
        factor = -(-LEAST_SIDE // max(picture.shape[:2]))
        picture = picture.repeat(factor, 0).repeat(factor, 1)
        # The usual video formats halve the resolution of colours: both sides have to be even.
        self._bytes += picture.nbytes
        if self._buffer is not None and self._bytes > MOST_GIF_BYTES:
            raise UserError(
                f'{self._path} is too long for a .gif, whose pictures are kept in memory up to '
                f'{MOST_GIF_BYTES / 1e9:g} GB; write the video as .mp4.'
            )
        picture = np.pad(picture, [(0, side % 2) for side in picture.shape[:2]] + [(0, 0)], 'edge')
        with warnings.catch_warnings():
            # ffmpeg starts with the first picture. Its process runs no Python, so it cannot meet
            # the deadlock that JAX warns of.
            warnings.filterwarnings('ignore', r'os\.fork\(\)', RuntimeWarning)
            with self._writing():
                self._writer = self._writer or self._start()
                self._writer.append_data(picture)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f'Cannot write the video {self._path}: {one_line(error)}') from error

    def _start(self) -> Any:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.suffix == '.gif':
            # Where imageio cannot write a file at the end, it tries again as it is deleted.
            self._buffer = io.BytesIO()
            duration = 1000 / min(self.frame_rate, GIF_FRAME_RATE)
            return self._open(self._buffer, format='.gif', duration=duration, loop=0)
        return self._open(self._path, fps=self.frame_rate, macro_block_size=1)


def _complete(path: Path) -> bool:
    """Whether an .mp4 is whole: boxes of bytes up to its end, one of them `moov`."""
    data, start, names = path.read_bytes(), 0, []
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4])
        if size == 1:  # it follows the name
            size = int.from_bytes(data[start + 8 : start + 16])
        names.append(data[start + 4 : start + 8])
        start += max(size, 8)
    return start == len(data) and b'moov' in names


def picture(env: VectorEnvironment, records: Records) -> np.ndarray:
    """Returns what the first environment shows: its own rendering, or an image that it observes.

    Raises:
      UserError: it does neither, or what it draws is no picture.
    """
    drawn = env.render()
    if drawn is not None:
        image = drawn[..., None] if drawn.ndim == 2 else drawn
        if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
            raise UserError(
                f'render() returns an array of shape {drawn.shape}; a picture is [H, W, 3].'
            )
        if image.dtype != np.uint8:
            raise UserError(
                f'render() returns {image.dtype}; the numbers of a picture are uint8, 0 to 255.'
            )
        return colours(image) if image.shape[-1] == 1 else image
    for name, spec in env.observation_specs.items():
        if spec.kind == 'image':
            return colours(records.observation[name][0])
    raise UserError('This environment draws no pictures, so that there can be no video.')


def colours(images: np.ndarray) -> np.ndarray:
    """Returns [..., 3] of [..., C]: grey as the first channel where these are no three colours."""
    return np.repeat(images[..., :1], 3, -1) if images.shape[-1] != 3 else images

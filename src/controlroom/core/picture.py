"""A drawn picture: a `PIL.Image.Image` that takes its manifest along when it is saved as PNG.

Pillow reads text chunks of a PNG into ``image.info`` but does not write them back; this class does, so that
``out.images[0].save("anna.png")`` can be replayed. Copies and edited versions are ordinary images without a manifest,
since they are no longer what the run drew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

from PIL import Image

from controlroom.core.png import png_bytes, save_png


class DrawnImage(Image.Image):
    """A picture with text for its PNG in ``text``."""

    text: dict[str, str]

    @classmethod
    def of(cls, image: Image.Image, text: Mapping[str, str]) -> DrawnImage:
        """The same pixels with text."""
        drawn = image.copy()
        drawn.__class__ = cls
        assert isinstance(drawn, cls)
        drawn.text = dict(text)
        return drawn

    def save(self, fp: str | os.PathLike[str] | IO[bytes], format: str | None = None, **params: Any) -> None:
        """As Pillow; a PNG carries the manifest and is written whole or not at all.

        Raises:
            OutputError: the PNG could not be written.
        """
        path = os.fspath(fp) if isinstance(fp, str | os.PathLike) else None
        suffix = os.path.splitext(path)[1].lower() if path is not None else ""
        is_png = (format or "").upper() == "PNG" or (format is None and suffix == ".png")
        text = getattr(self, "text", None)
        if not is_png or not text or "pnginfo" in params:
            super().save(fp, format, **params)
        elif path is not None:
            save_png(self, path, text)
        else:
            assert not isinstance(fp, str | os.PathLike)
            fp.write(png_bytes(self, text))

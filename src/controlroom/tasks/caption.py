"""Who says what a picture shows: BLIP from a folder, or the theatre's reader."""

from __future__ import annotations

from controlroom.backbones.loading import THEATRE
from controlroom.signals.captioner import Captioner


def choose_captioner(model: str | None = None) -> Captioner:
    """The captioner of a model.

    Args:
        model: folder of BLIP for photographs; ``theatre``, or None: the theatre's attribute reader put into words.

    Raises:
        ModelError: the model is not there.
    """
    if model not in (None, THEATRE):
        from controlroom.signals.captioner import BlipCaptioner

        return BlipCaptioner(str(model))
    from controlroom.data.theatre.captioner import TheatreCaptioner
    from controlroom.evaluation.extractors.theatre import theatre_reader

    return TheatreCaptioner(theatre_reader())

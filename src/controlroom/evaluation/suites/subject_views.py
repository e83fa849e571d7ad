"""The same subject from views that words ask for: is it seen from there, and is it still the same?

A case is one of the theatre's people under a prompt that says from where they are seen ("a sks woman in a studio, seen
from behind"). The looks that a view hides are not asked for. Methods and arms are those of the suite ``subject``; each
view also has rows of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from controlroom.data.subjects import TOKEN
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.subjects import SubjectPrompt, TheatreSubject
from controlroom.evaluation.suites import subject
from controlroom.evaluation.suites.subject import FOLLOWED, KEPT, Asked, SubjectJudge
from controlroom.evaluation.suites.suite import Measure, Suite
from controlroom.signals.readers import AttributeReader

PLACES = ("studio", "beach", "city")


class Settings(subject.Settings):
    """As those of the suite ``subject``; only people are asked for views."""

    props: int = 0
    spread: bool = False


def views_of(_: TheatreSubject) -> tuple[SubjectPrompt, ...]:
    """Each view in each of some places; only the view is asked for.

    >>> views_of(None)[4].text  # type: ignore[arg-type]
    'a {token} on the beach, seen from the front'
    """
    return tuple(
        SubjectPrompt(f"a {TOKEN} {v.PLACE_PHRASES[place]}, seen {v.VIEW_PHRASES[view]}", {"view": view}, view=view)
        for place in PLACES
        for view in v.VIEWS
    )


def kept_from(view: str) -> str:
    """Name of a view's measure of looks."""
    return f"{KEPT}, {v.VIEW_PHRASES[view]}"


def seen_from(view: str) -> str:
    """Name of a view's measure of being that view."""
    return f"seen {v.VIEW_PHRASES[view]}"


class ViewJudge(SubjectJudge):
    """As of subjects, and the same by view."""

    def __init__(self, reader: AttributeReader, arms: Sequence[str]) -> None:
        super().__init__(reader, arms)
        self.fingerprint = f"views {self.fingerprint}"
        for view in v.VIEWS:
            kept = Measure(kept_from(view), extractor=self.label)
            self.measures = (*self.measures, kept, Measure(seen_from(view), "share", extractor=self.label))

    def judged(self, asked: Asked, arm: str, said: Mapping[str, str]) -> dict[str, float | None]:
        found, view = super().judged(asked, arm, said), asked.prompt.view
        return {**found, kept_from(view): found[KEPT], seen_from(view): found[FOLLOWED]}


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Asked]:
    """The suite of ``n`` prompts, people in turn.

    Raises:
        InputError, ModelError: as those of the suite ``subject``.
    """
    found = subject.build(settings, n, reader, views_of, ViewJudge)
    return replace(found, name="subject_views", title="One subject from views that words ask for")

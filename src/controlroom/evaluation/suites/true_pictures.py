"""What suites share that edit true pictures: a scene before an edit is given, and its truth is known.

"Outside" is where the true pictures before and after do not differ (`Edit.changed`), and PSNR there is to the picture
that was given. The autoencoder's reconstruction of that picture is an arm: no edit that goes through latents can keep
more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.editing import AFTER, BEFORE, CEILING, REPROMPTED
from controlroom.evaluation.suites.inversion import AUTOENCODER, reconstructed
from controlroom.evaluation.suites.suite import Arm, Case, Suite, SuiteSettings, Table
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader, KeypointReader

Make = Callable[[Pipeline], Image.Image]


def true_picture_suite(
    name: str,
    title: str,
    settings: SuiteSettings,
    n: int,
    edit: Callable[[int], Edit],
    arms: Sequence[Arm],
    made: Callable[[int, Edit, RunSpec], Mapping[str, Make]],
    say: Callable[[Edit], str],
    attribute_reader: AttributeReader | None,
    keypoint_reader: KeypointReader | None,
    weights: tuple[str, ...] = (),
    baseline: str = REPROMPTED,
    note: str = "",
) -> Suite[Edit]:
    """A suite of edits of true pictures.

    Args:
        name, title, settings, n: of the suite.
        edit: number -> edit.
        arms: the method's; the first is the one that ranks are of.
        made: number, edit, and the run that re-prompts -> what makes each of them.
        say: what a report says of an edit.
        attribute_reader, keypoint_reader: None: the theatre's.
        weights: as in `Suite`.
        baseline: arm that differences are to: of edits from an inversion, what the inversion can do alone, and not a
            picture from other noise.
        note: what a reader must know beside what holds for all of them.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    names = tuple(arm.name for arm in arms)

    def case(number: int) -> Case[Edit]:
        found = edit(number)
        _, target = editing.caption_specs(found, settings, number)
        own = made(number, found, target)
        return Case(
            number,
            say(found),
            found,
            {REPROMPTED: target},
            {BEFORE: lambda: render(found.before), AFTER: lambda: render(found.after)},
            {AUTOENCODER: lambda pipe: reconstructed(pipe, render(found.before)), **own},
        )

    groups = [editing.Compared(BEFORE, (AUTOENCODER, REPROMPTED, *names, AFTER), true=True)]
    return Suite(
        name=name,
        title=title,
        n=n,
        settings=settings,
        arms=(
            Arm(BEFORE, "picture given", known=True),
            Arm(AUTOENCODER, "autoencoder alone"),
            Arm(REPROMPTED, "drawn from the caption after"),
            *arms,
            Arm(AFTER, "true after (readers)", known=True),
        ),
        case=case,
        judges=(editing.EditJudge(*editing.readers(attribute_reader, keypoint_reader), groups, true_region=True),),
        table=Table(
            rank=lambda values: editing.edit_rank(values, names[0]),
            baseline=baseline,
            ours=names[0],
            others=tuple(name for name in (*names[1:], REPROMPTED) if name != baseline),
            note=f"PSNR (cut at {CEILING:.0f} dB) and L1 are to the picture given, where the true pictures before and "
            f"after do not differ.{f' {note}' if note else ''}",
        ),
        weights=weights,
        reference=BEFORE,
        world=WORLD_VERSION,
    )

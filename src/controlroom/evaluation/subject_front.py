"""Subject fidelity against prompt fidelity as adapters learn: trained, measured and drawn by one command.

``python -m controlroom.evaluation.subject_front`` trains Textual Inversion, DreamBooth, DreamBooth-LoRA and DCO on one
of the theatre's people, keeps what each has learned after every number of steps, measures them all with the suite
``subject`` (DCO without and with consistency guidance), and draws the curves. Stopped, the same line goes on.

Rates are for the theatre's small network; learning rates are constant, since a run that decays to its end has only one
end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.files import atomic_path, write_text_atomically
from controlroom.core.memory import keep_freed_memory
from controlroom.data.subjects import named
from controlroom.data.theatre.subjects import TheatreSubject, theatre_subjects

if TYPE_CHECKING:
    from controlroom.data.pictures import Picture
    from controlroom.evaluation.suites.report import Report
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.recipe_settings import RecipeSettings

WORD, LEARNED = "sks", "<subject>"


@dataclass(frozen=True)
class Method:
    """A way of learning a subject.

    Attributes:
        settings: words of the class -> settings of its recipe.
        rate: of learning.
        batch: pictures of one step.
    """

    settings: Callable[[str], RecipeSettings]
    rate: float
    batch: int = 4


def _textual_inversion(class_words: str) -> RecipeSettings:
    from controlroom.training.recipes.textual_inversion import TextualInversionSettings

    return TextualInversionSettings(word=LEARNED, initial=class_words.split()[-1], captions=True)


def _dreambooth(class_words: str) -> RecipeSettings:
    from controlroom.training.recipes.dreambooth import DreamBoothSettings

    return DreamBoothSettings(class_prompt=f"a {class_words}", class_count=32, class_steps=20)


def _dreambooth_lora(class_words: str) -> RecipeSettings:
    from controlroom.training.recipes.dreambooth_lora import DreamBoothLoRASettings

    return DreamBoothLoRASettings(class_prompt=f"a {class_words}", class_count=32, class_steps=20, rank=16)


def _dco(class_words: str) -> RecipeSettings:
    from controlroom.training.recipes.dco import DCOSettings

    return DCOSettings(word=WORD, rank=16)


METHODS: dict[str, Method] = {
    "textual_inversion": Method(_textual_inversion, 5e-3),
    "dreambooth": Method(_dreambooth, 1e-4),
    "dreambooth_lora": Method(_dreambooth_lora, 2e-3),
    "dco": Method(_dco, 2e-3),
}


def subject_of(name: str | None, puppets: int, props: int) -> TheatreSubject:
    """A subject of the theatre's DreamBench; None: the first.

    Raises:
        InputError: there is none of that name.
    """
    known = {subject.name: subject for subject in theatre_subjects(puppets, props)}
    if name is not None and name not in known:
        raise InputError(f"The theatre's DreamBench has no subject {name!r}. It has: {', '.join(known)}.")
    return known[name] if name is not None else next(iter(known.values()))


@dataclass(frozen=True)
class Learned:
    """Who or what is learned.

    Attributes:
        name: of the folder for what was learned.
        class_words: what it is one of: "woman".
        pictures: of it; captions say ``{token}`` where its words go.
        folder: for its trainings.
        class_folder: for pictures of the class, which several subjects may share.
    """

    name: str
    class_words: str
    pictures: Sequence[Picture]
    folder: Path
    class_folder: Path

    def captioned(self, method: str) -> list[Picture]:
        """Its pictures, captioned as it will be asked for: "<subject>" where a word is learned, or "sks woman"."""
        words = LEARNED if method == "textual_inversion" else f"{WORD} {self.class_words}"
        return [replace(one, caption=named(one.caption, words)) for one in self.pictures]


def train_over_steps(pipe: Pipeline, learned: Learned, name: str, method: Method, kept: Mapping[int, Path]) -> None:
    """Train a method on a subject, and keep what it has learned at each number of steps.

    Args:
        pipe: the untrained model.
        learned: the subject; a stopped call goes on in its folder.
        name: of the method.
        method: how it learns.
        kept: steps -> folder for what was learned by then.

    Raises:
        UnfinishedError: stopped by SIGTERM or Ctrl-C; the same call goes on.
    """
    from controlroom.training.loop import train
    from controlroom.training.recipes.imagic import UnfinishedError
    from controlroom.training.settings import TrainSettings

    settings = method.settings(learned.class_words)
    pictures = learned.captioned(name)
    for step, place in sorted(kept.items()):
        if place.is_dir():
            continue
        loop = TrainSettings(
            output_dir=learned.folder / name,
            total_steps=step,
            batch_size=method.batch,
            learning_rate=method.rate,
            keep_checkpoints=1,
            log_every=20,
        )
        result = train(settings.build(pipe, pictures, learned.class_folder), loop)
        if not result.finished:
            raise UnfinishedError(f"{name} was stopped ({result.reason}) at step {result.step}. Run it again.")
        beside = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(result.weights, beside)
        beside.rename(place)
        print(f"{learned.name}, {name}: {step} steps", flush=True)


def measure(subject: TheatreSubject, names: Sequence[str], n: int, work: Path, more: Mapping[str, Any]) -> Report:
    """The suite ``subject`` of these methods on this subject, from where it was stopped.

    Args:
        subject: whose adapters are measured.
        names: folders of ``work/adapters``.
        n: prompts.
        work: folder of the adapters and the journal.
        more: further settings of the suite.
    """
    from controlroom.evaluation.suites.measuring import measured
    from controlroom.evaluation.suites.table import open_suite

    settings = {"adapters": str(work / "adapters"), "methods": tuple(names), "subjects": (subject.name,)}
    suite = open_suite("subject", n, {"word": WORD, "spread": False, **settings, **more})
    return measured(suite, work / "subject.cases.jsonl")


def make_front(
    steps: Sequence[int],
    work: Path,
    n: int,
    name: str | None = None,
    methods: Mapping[str, Method] = METHODS,
    more: Mapping[str, Any] | None = None,
) -> Report:
    """Train all methods on one subject, measure them after each number of steps.

    Args:
        steps: of training, at which they are measured.
        work: folder for everything.
        n: prompts.
        name: of the subject; None: the first.
        methods: what is trained.
        more: further settings of the suite: ``model``, ``steps`` of the solver, ``puppets``, ``props``.

    Raises:
        InputError: no such subject, or no steps.
        UnfinishedError: stopped.
    """
    from controlroom.evaluation.suites.subject import Settings
    from controlroom.sampling.pipeline import Pipeline

    if not steps or min(steps) < 1:
        raise InputError(f"Say after how many steps of training to measure, such as 50 100 200; got {list(steps)}.")
    more = dict(more or {})
    asked = Settings(**more)
    subject = subject_of(name, asked.puppets, asked.props)
    pipe = Pipeline.from_pretrained(asked.model)
    folder = work / "training" / subject.name
    learned = Learned(subject.name, subject.class_words, subject.subject().pictures, folder, folder)
    for method, how in methods.items():
        # What the suite reads.
        kept = {step: work / "adapters" / f"{method}-{step}" / subject.name for step in sorted(set(steps))}
        train_over_steps(pipe, learned, method, how, kept)
    names = [f"{method}-{step}" for method in methods for step in sorted(set(steps))]
    return measure(subject, names, n, work, more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and draw; 0 when all is well, 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m controlroom.evaluation.subject_front",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subject", help="of the theatre's DreamBench; default: the first person")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 100, 200, 400], help="of training")
    parser.add_argument("--rate", nargs="+", default=[], metavar="METHOD=RATE", help="another learning rate")
    parser.add_argument("--n", type=int, default=50, help="prompts (default: 50)")
    parser.add_argument("--drawing-steps", type=int, default=20, help="of the solver")
    parser.add_argument("--model", default="theatre")
    parser.add_argument("--puppets", type=int, default=20, help="how many people the benchmark has")
    parser.add_argument("--props", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("runs/subject_front"))
    parser.add_argument("--output", type=Path, default=Path("docs/measured/subject.png"), help="and .json beside it")
    options = parser.parse_args(arguments)
    try:
        methods = {name: METHODS[name] for name in options.methods}
        methods |= _at_rates(methods, options.rate)
        more = {"model": options.model, "steps": options.drawing_steps}
        more |= {"puppets": options.puppets, "props": options.props}
        report = make_front(options.steps, options.work, options.n, options.subject, methods, more)
        from controlroom.evaluation.tradeoff import draw_front

        kept = report.model_copy(update={"picked": []})
        write_text_atomically(options.output.with_suffix(".json"), kept.model_dump_json(indent=1) + "\n")
        with atomic_path(options.output) as beside:
            draw_front(report).save(beside, "PNG")
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


def _at_rates(methods: Mapping[str, Method], given: Sequence[str]) -> dict[str, Method]:
    """Methods with other learning rates.

    Raises:
        InputError: not METHOD=RATE, or a method that is not trained.
    """
    found: dict[str, Method] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if name not in methods or not 0 < rate < float("inf"):
            raise InputError(f"--rate takes METHOD=RATE, such as dco=0.001, of {', '.join(methods)}; got {text!r}.")
        found[name] = replace(methods[name], rate=rate)
    return found


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())

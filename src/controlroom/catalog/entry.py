"""What an entry of the catalogue says, and the words that several entries share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["working", "planned"]
Backbone = Literal["sd1", "sd2", "sdxl"]

SD: tuple[Backbone, ...] = ("sd1", "sd2", "sdxl")
SD1: tuple[Backbone, ...] = ("sd1",)
SD2: tuple[Backbone, ...] = ("sd2",)
SD1_SDXL: tuple[Backbone, ...] = ("sd1", "sdxl")
SDXL: tuple[Backbone, ...] = ("sdxl",)

NO_WEIGHTS = "needs none"
UNCHECKED = "not checked yet"
SCALE_0 = "scale=0"


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper: its title, and its arXiv number where it has one."""

    title: str
    arxiv: str | None = None

    @property
    def url(self) -> str | None:
        """The page of the paper at arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the catalogue: a method, a model, a protocol or a task."""

    number: int
    """Its number in the project's list; the order of the docs."""
    key: str
    """One word that names it everywhere: file, recipe, test, page."""
    name: str
    papers: tuple[Paper, ...] = ()
    does: str
    """What it does here, in one sentence."""
    code: tuple[str, ...] = ()
    """Dotted paths ``module:Name`` of controls, functions or classes; where it will be while it is planned."""
    recipe: str | None = None
    """Dotted path of the training recipe, where the method trains."""
    signals: tuple[str, ...] = ()
    """Names of the signals it reads from a picture."""
    backbones: tuple[Backbone, ...] = ()
    """Backbones it runs on; empty where it has nothing to do with one."""
    weights_licence: str = NO_WEIGHTS
    """Licence of the public weights. Whoever loads them must keep to it; none are in this package."""
    status: Status = "planned"
    neutral: str | None = None
    """The setting at which it is bit-identical to its absence."""
    no_neutral: str | None = None
    """Why it has no such setting; exactly one of the two is given."""
    proof: str
    """What its implementation is compared with."""
    effect: str | None = None
    """Measured on the theatre, against no control; None until measured."""


TASK = "a task: it only builds a run out of controls, each of which has its own"
PROGRAM = "a program around the run: without it there is nothing to compare"
MODEL = "a model of its own, not a change to a run"
DATA = "data or measurement: it changes no picture"

CONTROLNET = Paper("Adding Conditional Control to Text-to-Image Diffusion Models", "2302.05543")
DREAMBOOTH = Paper("DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", "2208.12242")
INSTRUCT_PIX2PIX = Paper("InstructPix2Pix: Learning to Follow Image Editing Instructions", "2211.09800")
IP_ADAPTER = Paper("IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", "2308.06721")
MAGICPOSE = Paper(
    "MagicPose: Realistic Human Poses and Facial Expressions Retargeting with Identity-aware Diffusion", "2311.12052"
)

"""A second picture that is drawn along with the run's, from the same noise with a prompt of its own.

Editing methods look at it: at its maps, its keys and values, its features. It has a state and branches of its own in
the same UNet batch. Where the run starts from given or inverted latents, so does it; with the prompt of an inverted
picture it then is that picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from controlroom.core.branch import Branch, Condition, ConditionSource, State
from controlroom.core.control import Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step


@dataclass(frozen=True)
class DrawnAlong:
    """Names of the picture's state and branches.

    Attributes:
        state: name of its latents; they end in ``result.states``.
    """

    state: str = "source"

    @property
    def cond(self) -> str:
        """Its branch with the prompt."""
        return f"{self.state}/cond"

    @property
    def uncond(self) -> str:
        """Its branch without one; a run without guidance has none."""
        return f"{self.state}/uncond"

    def states(self) -> tuple[State, ...]:
        """Latents that share the noise, and the start, of the run's picture."""
        return (State(self.state, noise_from="image"),)

    def branches(
        self, outline: Outline, roles: tuple[str, ...] = ("uncond", "cond"), steps: frozenset[int] | None = None
    ) -> tuple[Branch, ...]:
        """Its branches.

        Args:
            outline: says whether there is guidance.
            roles: those whose features the run's branch of that role reads.
            steps: steps at which they run; None: all.
        """
        return tuple(
            Branch(f"{self.state}/{role}", self.state, role, read_by=(role,) if role in roles else (), steps=steps)
            for role in ("uncond", "cond")
            if role in outline.text_branches
        )

    def tell(self, run: Run, prompts: Sequence[str] | None) -> None:
        """Set what its branches are told: these prompts, one for each image, and for the rest what the run is told.

        None: the run's own prompts, in whatever way another control encodes them.
        """
        if prompts is None:
            run.set_condition(self.cond, _as("cond"))
        else:
            unique = list(dict.fromkeys(prompts))
            condition = run.encode_text(unique).take([unique.index(text) for text in prompts])
            cond = run.conditions["cond"]
            if isinstance(cond, Condition):
                # The sizes that Stable Diffusion XL is told are the run's.
                condition = replace(condition, time_ids=cond.time_ids)
            run.set_condition(self.cond, condition)
        if self.uncond in run.plan.branches:
            run.set_condition(self.uncond, _as("uncond"))

    def check(self, step: Step, label: str) -> None:
        """Whether its branches run in the same pass as those of the picture, which read them.

        Raises:
            InputError: they are told texts of different lengths, which cannot share a pass.
        """
        own, other = (step.condition(name).tokens.shape[1] for name in (self.cond, "cond"))
        if own != other:
            raise InputError(
                f"{label}: the source prompt is encoded as {own} tokens and the prompt as {other}, so they cannot be "
                f"drawn in one pass. Shorten the prompt, or leave out the control that encodes long ones."
            )


def _as(branch: str) -> ConditionSource:
    """What a branch is told, also where another control sets it later or step by step (null-text inversion)."""

    def told(step: Step) -> Condition:
        source = step.run.conditions[branch]
        return source if isinstance(source, Condition) else source(step)

    return told


def source_prompts(source: str | Sequence[str], prompts: Sequence[str], label: str) -> list[str]:
    """The source prompt of each image, out of one for all or one for each prompt.

    Raises:
        InputError: a number that does not fit the images.
    """
    listed = [source] if isinstance(source, str) else list(source)
    if len(prompts) % len(listed):
        raise InputError(f"{label} has {len(listed)} source prompts for {len(prompts)} pictures.")
    return [text for text in listed for _ in range(len(prompts) // len(listed))]

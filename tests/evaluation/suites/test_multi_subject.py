"""The suite of two subjects: right cases, a judge that tells the puppets apart, and all arms from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from controlroom.backbones import loading
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.regions.ms_diffusion import MSDiffusion
from controlroom.core.errors import InputError
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Puppet
from controlroom.evaluation.suites import multi_subject as suites
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.suite import Shown
from controlroom.evaluation.suites.table import open_suite
from tests.controls.loras import tiny_lora
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter, tiny_ms_diffusion
from tests.evaluation.suites.stage import Knows, write_stage
from tests.evaluation.suites.test_suites import measured
from tests.tiny import tiny_sd1


class Boxes(Knows):
    """Knows what is in each box of the scenes of companies."""

    def __init__(self, companies: Any) -> None:
        super().__init__([])
        for company in companies:
            for box, actor in zip(company.boxes, company.scene.actors, strict=True):
                part = suites.alone(render(company.scene), box)
                self.known[part.tobytes()] = replace(company.scene, actors=(actor,))


def test_each_box_is_judged_by_itself() -> None:
    company = suites.company_of(0)
    first, second = company.scene.actors
    assert isinstance(first, Puppet) and isinstance(second, Puppet)
    swapped = replace(
        company.scene,
        actors=(replace(first, identity=second.identity), replace(second, identity=first.identity)),
    )
    changed = replace(
        first,
        identity=replace(first.identity, top=replace(first.identity.top, colour=_other(first.identity.top.colour))),
    )
    painted = replace(company.scene, actors=(changed, second))
    known = [company, replace(company, scene=swapped), replace(company, scene=painted)]
    reader: Any = Boxes(known)
    case = suites.build(suites.Settings(), 1, reader).case(0)
    pictures = {"without": render(swapped), "words": render(painted), "truth": render(company.scene)}
    (found,) = suites.InBoxes(reader)([Shown(case, pictures)])
    assert found["truth"] == {suites.EACH: 1.0, suites.BOTH: 1.0, suites.APART: 1.0}
    assert found["words"][suites.BOTH] == 0.0 and 0.5 < (found["words"][suites.EACH] or 0) < 1.0
    assert found["without"][suites.APART] == 0.0 and (found["without"][suites.EACH] or 0) < 1.0


def _other(colour: str) -> str:
    return next(name for name in ("red", "green", "blue") if name != colour)


def weights(folder: Path, n: int) -> dict[str, Any]:
    """Tiny weights for every arm, on the stage's UNet."""
    unet = tiny_sd1().unet
    for name, tensors in (("ms", tiny_ms_diffusion(unet)), ("ip", tiny_ip_adapter(unet))):
        (folder / name).mkdir(parents=True)
        file = "ip_adapter.safetensors" if name == "ip" else "ms_adapter.safetensors"
        save_file(tensors, str(folder / name / file))
        tiny_image_encoder().save_pretrained(folder / name / "image_encoder")
    (folder / "loras").mkdir()
    for number in range(n):
        for side in (0, 1):
            tiny_lora(folder / "loras" / f"{number}-{side}.safetensors", tiny_sd1, seed=2 * number + side)
    return {"ms_diffusion": str(folder / "ms"), "ip_adapter": str(folder / "ip"), "loras": str(folder / "loras")}


def test_cases_have_boxes_pictures_and_names(tmp_path: Path) -> None:
    reader: Any = Knows([])
    settings = suites.Settings(**weights(tmp_path, 1), lora_name="sks {word}")
    case = suites.build(settings, 1, reader).case(0)
    company = case.truth
    (ms,), (ip,), loras = (case.specs[arm].controls for arm in (suites.MS, suites.ADAPTERS, suites.LORAS))
    assert isinstance(ms, MSDiffusion) and ms.boxes == list(company.boxes) and ms.words == list(company.words)
    assert isinstance(ip, IPAdapter) and len(ip.mask) == len(ip.image) == 2  # type: ignore[arg-type]
    assert [isinstance(lora, LoRA) and lora.mask is not None for lora in loras] == [True, True]
    assert str(case.specs[suites.LORAS].prompt).count("a sks ") == 2
    looks = company.scene.puppets[0].identity.top.colour
    assert looks in str(case.specs[suites.WORDS].prompt) and looks not in str(case.specs[suites.MS].prompt)
    assert {spec.seed for spec in case.specs.values()} == {1000}
    plain = suites.build(suites.Settings(), 1, reader)
    assert [arm.name for arm in plain.arms] == ["without", "words", "truth"]
    with pytest.raises(InputError, match="lacks 1-0"):
        suites.build(settings, 2, reader)


def test_two_cases_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage(tmp_path / "theatre")
    monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
    suite = open_suite("multi_subject", 2, {"steps": 1, **weights(tmp_path / "weights", 2)})
    plain = suite.case

    def small(number: int) -> Any:
        case = plain(number)
        size = {"height": 32, "width": 32}
        return replace(case, specs={arm: spec.model_copy(update=size) for arm, spec in case.specs.items()})

    report = measured(replace(suite, case=small), PipelineDrawer("theatre"), tmp_path)
    assert len(report.rows) == 3 and all(len(row.cells) == 6 for row in report.rows)
    assert all(cell.n == 2 for row in report.rows for cell in row.cells.values())

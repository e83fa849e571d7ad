"""What makes the recipe of each of the theatre's stages, out of what the stages before it left in ``runs/theatre``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from controlroom.training.recipe import Recipe

if TYPE_CHECKING:
    from controlroom.training.recipes.theatre_pose_controlnet import Learns

RUNS = Path("runs/theatre")
SCENES = 25_600
"""Scenes whose latents the UNet learns from, again and again with other captions."""
PAIRS = 8_000
"""Pairs of one puppet in two poses."""


def autoencoder() -> Recipe[Any]:
    """The autoencoder, from nothing."""
    from controlroom.training.recipes.theatre_autoencoder import TheatreAutoencoder

    return TheatreAutoencoder()


def clip() -> Recipe[Any]:
    """The small CLIP, from nothing."""
    from controlroom.training.recipes.theatre_clip import TheatreClip

    return TheatreClip(RUNS / "tokenizer")


def attribute_reader() -> Recipe[Any]:
    """What reads looks, places and things; it sees what the autoencoder makes of pictures too."""
    from controlroom.training.recipes.theatre_readers import TheatreAttributeReader

    return TheatreAttributeReader(RUNS / "autoencoder/weights")


def keypoint_reader() -> Recipe[Any]:
    """What reads poses, in scenes and doodles."""
    from controlroom.training.recipes.theatre_readers import TheatreKeypointReader

    return TheatreKeypointReader()


def dense_reader() -> Recipe[Any]:
    """What reads depth, parts and soft edges."""
    from controlroom.training.recipes.theatre_dense_reader import TheatreDenseReader

    return TheatreDenseReader(RUNS / "autoencoder/weights")


def unet() -> Recipe[Any]:
    """The UNet, from nothing."""
    from controlroom.training.recipes.theatre_unet import TheatreUNet

    return TheatreUNet(RUNS / "autoencoder/weights", RUNS / "clip/weights", RUNS / "latents", scenes=SCENES)


def trained_parts() -> tuple[Path, Path, Path]:
    """Folders of UNet, autoencoder and CLIP."""
    return RUNS / "unet/weights", RUNS / "autoencoder/weights", RUNS / "clip/weights"


def appearance() -> Recipe[Any]:
    """The appearance module, first stage of retargeting."""
    from controlroom.training.recipes.theatre_appearance import TheatreAppearance

    return TheatreAppearance(*trained_parts(), RUNS / "latents", pairs=PAIRS)


def pose() -> Recipe[Any]:
    """The pose ControlNet."""
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    return TheatrePoseControlNet(*trained_parts(), RUNS / "latents", pairs=PAIRS)


def retarget(learns: Learns) -> Recipe[Any]:
    """Both together, or one beside the other, which stays."""
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    pose, appearance = RUNS / "pose/weights", RUNS / "appearance/weights"
    if learns == "appearance":  # the writer alone goes on where the joint stage ended
        pose, appearance = RUNS / "retarget/weights/pose", RUNS / "retarget/weights/appearance"
    return TheatrePoseControlNet(
        *trained_parts(),
        RUNS / "latents",
        pairs=PAIRS,
        controlnet_folder=pose,
        appearance_folder=appearance,
        learns=learns,
    )


def controlnet(kind: str) -> Recipe[Any]:
    """A ControlNet for one kind of condition, or for all (``multi``)."""
    from controlroom.training.recipes.theatre_controlnet import TheatreControlNet

    return TheatreControlNet(*trained_parts(), RUNS / "latents", kind, SCENES)


def t2i_adapter(kind: str) -> Recipe[Any]:
    """A T2I-Adapter for one kind of condition."""
    from controlroom.training.recipes.theatre_t2i_adapter import TheatreT2IAdapter

    return TheatreT2IAdapter(*trained_parts(), RUNS / "latents", kind, SCENES)


def uni(part: Literal["local", "global"]) -> Recipe[Any]:
    """One of Uni-ControlNet's two adapters."""
    from controlroom.training.recipes.theatre_uni_controlnet import TheatreUniControlNet

    return TheatreUniControlNet(*trained_parts(), RUNS / "latents", part, SCENES)


def ip_adapter() -> Recipe[Any]:
    """The IP-Adapter that reads one picture."""
    from controlroom.training.recipes.theatre_ip_adapter import TheatreIPAdapter

    return TheatreIPAdapter(*trained_parts(), RUNS / "latents", pairs=PAIRS)


def ip_adapter_multi(aggregate: Any) -> Recipe[Any]:
    """The same for several pictures of a person, with this to make one of them."""
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_ip_adapter_multi

    return theatre_ip_adapter_multi(*trained_parts(), RUNS / "ip_adapter/weights", aggregate)


def grouped(kind: Literal["ms_diffusion", "blip_subject"]) -> Recipe[Any]:
    """What learns from groups of placed subjects."""
    from controlroom.data.theatre.groups import theatre_groups, theatre_subjects
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.clip_vision import image_encoder_of
    from controlroom.training.objective import ObjectiveSettings
    from controlroom.training.recipes.blip_subject import BLIPSubjectRecipe, BLIPSubjectSettings
    from controlroom.training.recipes.ms_diffusion import MSDiffusionRecipe, MSDiffusionSettings

    pipe, encoder = Pipeline.from_pretrained("theatre"), image_encoder_of(RUNS / "clip/weights")
    objective, cache = ObjectiveSettings(min_snr_gamma=5.0), RUNS / "latents"
    if kind == "ms_diffusion":
        groups, held_out = theatre_groups(PAIRS), theatre_groups(16, "held_out")
        return MSDiffusionRecipe(pipe, encoder, groups, MSDiffusionSettings(objective=objective), held_out, cache)
    groups, held_out = theatre_subjects(PAIRS), theatre_subjects(16, "held_out")
    return BLIPSubjectRecipe(pipe, encoder, groups, BLIPSubjectSettings(objective=objective), held_out, cache)


def faces(kind: Literal["instant_id", "photomaker"]) -> Recipe[Any]:
    """What learns faces."""
    from controlroom.training.recipes.theatre_faces import theatre_instant_id, theatre_photomaker
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    unet, vae, clip = trained_parts()
    make = theatre_instant_id if kind == "instant_id" else theatre_photomaker
    return make(theatre_pipeline(unet, vae, clip), clip)


def kosmos(stage: Literal["language", "align", "instruct"]) -> Recipe[Any]:
    """A stage of KOSMOS-G."""
    from controlroom.training.recipes import theatre_kosmos as kosmos
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(*trained_parts())
    if stage == "language":
        return kosmos.theatre_kosmos_language(pipe, trained_parts()[2])
    if stage == "align":
        return kosmos.theatre_kosmos_align(pipe, RUNS / "kosmos_language/weights")
    return kosmos.theatre_kosmos_g(pipe, RUNS / "kosmos_align/weights", cache_folder=RUNS / "latents")


def unimo(stage: Literal["text", "instruct"]) -> Recipe[Any]:
    """A stage of UNIMO-G."""
    from controlroom.training.recipes import theatre_unimo as unimo
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(*trained_parts())
    if stage == "text":
        return unimo.theatre_unimo_text(pipe, RUNS / "kosmos_language/weights", cache_folder=RUNS / "latents")
    return unimo.theatre_unimo_g(pipe, RUNS / "unimo_text/weights", cache_folder=RUNS / "latents")


def instruct_pix2pix() -> Recipe[Any]:
    """The UNet that follows instructions."""
    from controlroom.training.recipes.theatre_instruct_pix2pix import TheatreInstructPix2Pix

    return TheatreInstructPix2Pix(*trained_parts(), RUNS / "latents", edits=PAIRS)


def inpaint() -> Recipe[Any]:
    """The UNet of nine channels."""
    from controlroom.training.recipes.theatre_inpaint import TheatreInpaint

    return TheatreInpaint(*trained_parts(), RUNS / "latents", scenes=SCENES)


def depth2img() -> Recipe[Any]:
    """The UNet that is given a depth."""
    from controlroom.training.recipes.theatre_depth2img import TheatreDepth2Img

    return TheatreDepth2Img(*trained_parts(), RUNS / "latents", scenes=SCENES)

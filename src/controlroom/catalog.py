"""The catalogue: one entry for each system of the project, and the table of control types that a run file may name.

Ordinary data: nothing here imports a control. The command line, the studio, the pages in ``docs/`` and the contract
tests all read this table. `load` turns a dotted path of it (``module:Name``) into the object, when it is asked for.

When a control lands: set its `status`, its `code` and `proof`, and add its line to `CONTROL_TYPES`; when its effect is
measured, write the numbers into `effect`, with n and the interval.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from controlroom.core.errors import InputError

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
    combines: str | None = None
    """What the test of pairs found; None until tested."""


_TASK = "a task: it only builds a run out of controls, each of which has its own"
_PROGRAM = "a program around the run: without it there is nothing to compare"
_MODEL = "a model of its own, not a change to a run"
_DATA = "data or measurement: it changes no picture"

CONTROLNET = Paper("Adding Conditional Control to Text-to-Image Diffusion Models", "2302.05543")
DREAMBOOTH = Paper("DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", "2208.12242")
INSTRUCT_PIX2PIX = Paper("InstructPix2Pix: Learning to Follow Image Editing Instructions", "2211.09800")
IP_ADAPTER = Paper("IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", "2308.06721")
MAGICPOSE = Paper(
    "MagicPose: Realistic Human Poses and Facial Expressions Retargeting with Identity-aware Diffusion", "2311.12052"
)

SYSTEMS: tuple[System, ...] = (
    System(
        number=1,
        key="retarget",
        name="PoseMaster Fusion: retargeting",
        does="A picture of a person, a pose (photo, doodle, JSON) and optional words give the same person in that "
        "pose, styled by the words.",
        code=("controlroom.tasks.retarget:retarget",),
        signals=("pose", "doodle"),
        backbones=SD,
        status="working",
        no_neutral=_TASK,
        proof="the run it builds, its poses of every kind and its files, on tiny random weights; scales of 0 are a run "
        "of words alone",
        effect="n=300: PCK@0.2 98.5 %; of nine attributes of the person top colour 99.3 %, lower colour 98.3, skin "
        "97.7, pattern 96.3, hair length 92.7, lower garment 90.3, hair colour 89.3, kind of top 88.3, hat "
        "73.3 (reference-only: 38.7 to 70.7); the place 98.7",
    ),
    System(
        number=2,
        key="appearance",
        name="Appearance control module",
        papers=(MAGICPOSE,),
        does="A copy of the UNet reads the source; its inputs of self-attention join the main network's keys and "
        "values.",
        code=("controlroom.controls.pose.appearance:AppearanceControl",),
        recipe="controlroom.training.recipes.theatre_appearance:TheatreAppearance",
        backbones=SD,
        weights_licence="USC research licence, non-commercial",
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published equations in the test, on tiny random weights",
    ),
    System(
        number=3,
        key="pose_control",
        name="Appearance-disentangled pose control",
        papers=(MAGICPOSE,),
        does="A pose ControlNet fine-tuned with the appearance module: jointly, with it frozen, or only the blocks "
        "that receive the pose.",
        code=("controlroom.controls.spatial.controlnet:ControlNet",),
        recipe="controlroom.training.recipes.theatre_pose_controlnet:TheatrePoseControlNet",
        signals=("pose",),
        backbones=SD,
        weights_licence="USC research licence, non-commercial",
        status="working",
        neutral=SCALE_0,
        proof="keypoints of the drawn picture against the asked pose, on held-out theatre pairs",
    ),
    System(
        number=4,
        key="imagic",
        name="Text-guided enhancement",
        papers=(Paper("Imagic: Text-Based Real Image Editing with Diffusion Models", "2210.09276"), INSTRUCT_PIX2PIX),
        does="Optimises the text embedding (or the text encoder) towards the picture, fine-tunes, interpolates to the "
        "wanted words, draws at low resolution and super-resolves; also joined with an instruction embedding.",
        code=(
            "controlroom.controls.editing.imagic:Imagic",
            "controlroom.controls.editing.upscale:Upscale",
            "controlroom.tasks.enhance:enhance",
        ),
        recipe="controlroom.training.recipes.imagic:ImagicRecipe",
        backbones=SD,
        status="working",
        neutral='alpha=1, network="base"',
        proof="transcription of the formulas of both stages and of the interpolation in the test, on tiny random "
        "weights",
    ),
    System(
        number=5,
        key="pose",
        name="Pose input",
        papers=(
            Paper("OpenPose: Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields", "1812.08008"),
            Paper("ViTPose: Simple Vision Transformer Baselines for Human Pose Estimation", "2204.12484"),
            Paper("Effective Whole-body Pose Estimation with Two-stages Distillation", "2307.15880"),
        ),
        does="Keypoints from photos, drawn skeletons, JSON and doodles; read once, editable, accepted again.",
        code=("controlroom.core.pose:Pose", "controlroom.signals.pose.source:read_pose"),
        recipe="controlroom.training.recipes.theatre_readers:TheatreKeypointReader",
        signals=("pose", "doodle"),
        weights_licence="ViTPose and RTMPose Apache-2.0; OpenPose's own weights non-commercial",
        status="working",
        no_neutral=_DATA,
        proof="round trips of every format; the reader's error on held-out renders and doodles",
    ),
    System(
        number=6,
        key="controlnet",
        name="ControlNet",
        papers=(CONTROLNET,),
        does="Draws along condition maps (canny, hed, mlsd, normal, depth, segmentation, scribble, pose), several at "
        "once.",
        code=("controlroom.controls.spatial.controlnet:ControlNet",),
        recipe="controlroom.training.recipes.theatre_controlnet:TheatreControlNet",
        signals=("canny", "hed", "mlsd", "normal", "depth", "segmentation", "scribble", "pose"),
        backbones=SD,
        weights_licence="OpenRAIL",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionControlNetPipeline and StableDiffusionXLControlNetPipeline, one "
        "and several, also from pictures and with inpainting",
        effect="theatre/multi, n=16 for each kind: pose PCK@0.2 0.983 (no control 0.354), depth 0.904 (0.724), "
        "normals 9.0 degrees (19.3), parts IoU 0.578 (0.349), edges F1 0.530 to 0.763 (0.352 to 0.505)",
    ),
    System(
        number=7,
        key="reference_only",
        name="Reference-only",
        does="Self-attention and group-norm statistics of a reference picture, no training; a technique of the A1111 "
        "and diffusers communities.",
        code=("controlroom.controls.style.reference_only:ReferenceOnly",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="transcription of the community pipeline's equations in the test",
        effect="n=16: colours taken over in 0.609, structure 0.214 (pose ControlNet + IP-Adapter: 0.453, 0.432); "
        "beside a pose ControlNet, n=300, the person's attributes 38.7 to 70.7 %",
    ),
    System(
        number=8,
        key="ip_adapter_controlnet",
        name="IP-Adapter + ControlNet",
        papers=(IP_ADAPTER, CONTROLNET),
        does="The baseline for pose transfer.",
        code=("controlroom.tasks.retarget:baseline",),
        signals=("pose",),
        backbones=SD,
        weights_licence="Apache-2.0 and OpenRAIL",
        status="working",
        no_neutral=_TASK,
        proof="both controls at once against diffusers' pipeline, on tiny random weights",
    ),
    System(
        number=9,
        key="masactrl",
        name="MasaCtrl",
        papers=(
            Paper(
                "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing",
                "2304.08465",
            ),
        ),
        does="Mutual self-attention: the edit's queries read the source's keys and values, with masks.",
        code=("controlroom.controls.editing.masactrl:MasaCtrl",),
        backbones=SD,
        status="working",
        neutral="start_step=num_inference_steps",
        proof="transcription of the published attention edit, with and without masks, that materialises probabilities, "
        "in the test",
        effect="n=64: pose changed in 59.4 % (prompted again: 62.5), identity kept 0.928, 3.0 points [1.4, 4.6] "
        "more than prompted again",
    ),
    System(
        number=10,
        key="t2i_adapter",
        name="T2I-Adapter",
        papers=(
            Paper(
                "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for "
                "Text-to-Image Diffusion Models",
                "2302.08453",
            ),
        ),
        does="A light, time-independent condition adapter.",
        code=("controlroom.controls.spatial.t2i_adapter:T2IAdapter",),
        recipe="controlroom.training.recipes.theatre_t2i_adapter:TheatreT2IAdapter",
        signals=("canny", "depth", "scribble", "pose"),
        backbones=SD,
        weights_licence="Apache-2.0",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionAdapterPipeline and StableDiffusionXLAdapterPipeline: full, light "
        "and XL adapters, several at once",
    ),
    System(
        number=11,
        key="unimo_g",
        name="UNIMO-G",
        papers=(Paper("UNIMO-G: Unified Image Generation through Multimodal Conditional Diffusion", "2401.13388"),),
        does="Interleaved text and images of several entities as the prompt.",
        code=("controlroom.controls.personal.unimo_g:UnimoG",),
        recipe="controlroom.training.recipes.unimo_g:UnimoGRecipe",
        backbones=SD,
        weights_licence="no public weights known",
        status="working",
        neutral=SCALE_0,
        proof="transcription of what the network is told, latents of runs of a UNet with its keys and values",
    ),
    System(
        number=12,
        key="blip_diffusion",
        name="BLIP-Diffusion",
        papers=(
            Paper(
                "BLIP-Diffusion: Pre-trained Subject Representation for Controllable "
                "Text-to-Image Generation and Editing",
                "2305.14720",
            ),
        ),
        does="A subject embedding from a multimodal encoder, spliced into the text.",
        code=("controlroom.controls.personal.blip_diffusion:BLIPDiffusion",),
        recipe="controlroom.training.recipes.blip_diffusion:BLIPDiffusionRecipe",
        backbones=SD,
        weights_licence=UNCHECKED,
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' BlipDiffusionPipeline; the encoder against transformers' parts",
    ),
    System(
        number=13,
        key="pose_datasets",
        name="Pose datasets and metrics",
        papers=(
            Paper("DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich Annotations (CVPR 2016)"),
            Paper(
                "Learning High Fidelity Depths of Dressed Humans by Watching Social Media Dance Videos", "2103.03319"
            ),
        ),
        does="DeepFashion and TikTok from disk; SSIM, LPIPS, FID, CLIP score.",
        code=("controlroom.evaluation.suites.pose_transfer:PoseTransferSuite",),
        signals=("pose",),
        no_neutral=_DATA,
        proof="each metric against an independent implementation; readers against written sample folders",
    ),
    System(
        number=14,
        key="ddpm",
        name="DDPM",
        papers=(Paper("Denoising Diffusion Probabilistic Models", "2006.11239"),),
        does="Forward process, noise prediction and ancestral sampling, from scratch.",
        code=("controlroom.sampling.ddpm:DDPM",),
        recipe="controlroom.training.recipes.ddpm:DDPMRecipe",
        status="working",
        no_neutral=_MODEL,
        proof="closed-form Gaussian posteriors; pictures equal diffusers' DDPMPipeline and DDIMPipeline",
    ),
    System(
        number=15,
        key="latent_diffusion",
        name="Latent diffusion",
        papers=(Paper("High-Resolution Image Synthesis with Latent Diffusion Models", "2112.10752"),),
        does="An autoencoder (reconstruction, KL, perceptual, adversarial) and diffusion in its latents.",
        code=("controlroom.sampling.pipeline:Pipeline", "controlroom.training.recipes.autoencoder:AutoencoderRecipe"),
        recipe="controlroom.training.recipes.latent_diffusion:LatentDiffusionRecipe",
        backbones=SD,
        status="working",
        weights_licence="Stable Diffusion: CreativeML OpenRAIL-M and OpenRAIL++",
        no_neutral=_MODEL,
        proof="a run without controls equals diffusers' StableDiffusionPipeline to 1e-5; "
        "held-out captions of the theatre",
    ),
    System(
        number=16,
        key="stylegan",
        name="StyleGAN",
        papers=(Paper("A Style-Based Generator Architecture for Generative Adversarial Networks", "1812.04948"),),
        does="Mapping network, AdaIN, noise, style mixing by scale.",
        code=("controlroom.gans.stylegan:StyleGAN",),
        recipe="controlroom.training.recipes.stylegan:StyleGANRecipe",
        weights_licence="NVIDIA's own are non-commercial; none are used",
        no_neutral=_MODEL,
        proof="the published equations, transcribed in the test",
    ),
    System(
        number=17,
        key="cyclegan",
        name="CycleGAN",
        papers=(
            Paper("Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", "1703.10593"),
        ),
        does="Unpaired translation, also from simulation to reality.",
        code=("controlroom.gans.cyclegan:CycleGAN",),
        recipe="controlroom.training.recipes.cyclegan:CycleGANRecipe",
        no_neutral=_MODEL,
        proof="theatre styles as the two domains, where the true counterpart is known",
    ),
    System(
        number=18,
        key="ctrl_x",
        name="Ctrl-X",
        papers=(
            Paper(
                "Ctrl-X: Controlling Structure and Appearance for Text-To-Image Generation Without Guidance",
                "2406.07540",
            ),
        ),
        does="Structure and appearance from any two pictures, no training.",
        code=("controlroom.controls.style.ctrl_x:CtrlX",),
        backbones=SD,
        status="working",
        neutral="structure=None, appearance=None",
        proof="transcription of the published feature and attention injection in the test",
        effect="n=16, layers of the latents' size: structure IoU 0.393 (pose ControlNet + IP-Adapter: 0.432), "
        "colours taken over 0.344 (0.453)",
    ),
    System(
        number=19,
        key="cross_image_attention",
        name="Cross-image attention",
        papers=(Paper("Cross-Image Attention for Zero-Shot Appearance Transfer", "2311.03335"),),
        does="Appearance transfer by attention between pictures.",
        code=("controlroom.controls.style.cross_image_attention:CrossImageAttention",),
        backbones=SD,
        status="working",
        neutral="start=end",
        proof="transcription of the published attention, guidance and edit-friendly steps in the test",
        effect="n=16: colours taken over in 0.844 (pose ControlNet + IP-Adapter: 0.453), structure IoU 0.298 (0.432)",
    ),
    System(
        number=20,
        key="controlnet_img2img",
        name="ControlNet img2img with estimated depth",
        papers=(CONTROLNET,),
        does="Style transfer that keeps the geometry.",
        code=("controlroom.tasks.stylise:stylise",),
        signals=("depth",),
        backbones=SD,
        weights_licence="OpenRAIL",
        status="working",
        no_neutral=_TASK,
        proof="parity with diffusers' StableDiffusionControlNetImg2ImgPipeline",
        effect="n=8: half precision, UniPC in 20 steps and estimated depth cost next to nothing; without depth it "
        "falls from 0.874 to 0.784",
    ),
    System(
        number=21,
        key="dreambooth",
        name="DreamBooth",
        papers=(DREAMBOOTH,),
        does="A subject as `[V] class`, with prior preservation.",
        code=("controlroom.training.recipes.dreambooth:DreamBoothSettings",),
        recipe="controlroom.training.recipes.dreambooth:DreamBooth",
        backbones=SD,
        status="working",
        no_neutral="it yields weights; the run itself is ordinary",
        proof="only what it declares moves; a broken run continues bit for bit; the class's share of the loss; what it "
        "writes loads in diffusers",
    ),
    System(
        number=22,
        key="ip_adapter",
        name="IP-Adapter",
        papers=(IP_ADAPTER,),
        does="Image prompt by decoupled cross-attention; base, plus, full face, FaceID; masks, scales by layer.",
        code=("controlroom.controls.personal.ip_adapter:IPAdapter",),
        recipe="controlroom.training.recipes.ip_adapter:IPAdapterRecipe",
        backbones=SD,
        weights_licence="Apache-2.0; the face variants non-commercial (InsightFace)",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' load_ip_adapter on StableDiffusionPipeline and StableDiffusionXLPipeline",
    ),
    System(
        number=23,
        key="ip_adapter_pooling",
        name="IP-Adapter + pooling",
        papers=(IP_ADAPTER,),
        does="Maximum or average over the embeddings of several pictures.",
        code=("controlroom.controls.personal.ip_adapter:IPAdapter",),
        backbones=SD,
        weights_licence="Apache-2.0",
        status="working",
        neutral=SCALE_0,
        proof="one picture given several times equals that picture alone",
    ),
    System(
        number=24,
        key="ip_adapter_self_attention",
        name="IP-Adapter + self-attention",
        papers=(IP_ADAPTER,),
        does="Self-attention over nine of ten pictures, trained to restore the tenth from its caption.",
        code=("controlroom.controls.personal.ip_adapter:IPAdapter",),
        recipe="controlroom.training.recipes.ip_adapter_multi:IPAdapterMultiRecipe",
        backbones=SD,
        weights_licence="Apache-2.0",
        status="working",
        neutral=SCALE_0,
        proof="attention against its formula; a run against diffusers told what the pictures became",
    ),
    System(
        number=25,
        key="lfw",
        name="LFW protocol",
        does="People with at least ten pictures, split 2:1; FID and IS.",
        code=(
            "controlroom.data.lfw:lfw",
            "controlroom.data.lfw:people_split",
            "controlroom.data.theatre.people:theatre_people",
            "controlroom.evaluation.suites.people:build",
        ),
        status="working",
        no_neutral=_DATA,
        proof="the split on written sample folders and on the theatre's people; metrics against independent "
        "implementations",
    ),
    System(
        number=26,
        key="instruct_pix2pix",
        name="InstructPix2Pix",
        papers=(INSTRUCT_PIX2PIX,),
        does="Two guidance scales; training; generated pairs.",
        code=("controlroom.controls.editing.instruct_pix2pix:InstructPix2Pix",),
        recipe="controlroom.training.recipes.instruct_pix2pix:InstructPix2PixRecipe",
        backbones=SD,
        weights_licence="MIT",
        status="working",
        no_neutral="its checkpoint has eight input channels and needs the picture",
        proof="parity with diffusers' StableDiffusionInstructPix2PixPipeline and "
        "StableDiffusionXLInstructPix2PixPipeline",
        effect="n=64: instruction followed 67.2 % [55.0, 77.4], outside 22.1 dB [20.8, 23.4]",
    ),
    System(
        number=27,
        key="pix2pix_zero",
        name="Pix2Pix-Zero",
        papers=(Paper("Zero-shot Image-to-Image Translation", "2302.03027"),),
        does="Edit direction in embedding space, cross-attention guidance, regularised inversion.",
        code=(
            "controlroom.controls.editing.pix2pix_zero:Pix2PixZero",
            "controlroom.controls.edit_direction:edit_direction",
        ),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionPix2PixZeroPipeline, on drawn and on inverted pictures",
    ),
    System(
        number=28,
        key="attend_and_excite",
        name="Attend-and-Excite",
        papers=(
            Paper(
                "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", "2301.13826"
            ),
        ),
        does="No subject of the prompt is neglected.",
        code=("controlroom.controls.guidance.attend_and_excite:AttendAndExcite",),
        backbones=SD,
        status="working",
        neutral="step_size=0",
        proof="parity with diffusers' StableDiffusionAttendAndExcitePipeline",
        effect="n=64: 8.2 % [3.2, 19.2] of the failures on two objects repaired",
    ),
    System(
        number=29,
        key="semantic_guidance",
        name="SEGA",
        papers=(Paper("SEGA: Instructing Text-to-Image Models using Semantic Guidance", "2301.12247"),),
        does="Adds or removes several concepts by degree.",
        code=("controlroom.controls.guidance.semantic_guidance:SemanticGuidance",),
        backbones=SD,
        status="working",
        neutral="edits=[]",
        proof="parity with diffusers' SemanticStableDiffusionPipeline",
        effect="n=64: the attribute appears in 85.9 % [75.4, 92.4], the others stay in 89.9 % [87.3, 92.4]",
    ),
    System(
        number=30,
        key="self_attention_guidance",
        name="Self-attention guidance",
        papers=(Paper("Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", "2210.00939"),),
        does="Guidance away from a prediction that is blurred where the network looks.",
        code=("controlroom.controls.guidance.self_attention_guidance:SelfAttentionGuidance",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionSAGPipeline",
        effect="n=64: Frechet distance as without, attributes 0.7 points [-1.9, 0.5] fewer",
    ),
    System(
        number=31,
        key="depth_to_image",
        name="Depth2Image",
        papers=(Paper("High-Resolution Image Synthesis with Latent Diffusion Models", "2112.10752"),),
        does="A variation that keeps the depth (Stable Diffusion 2's depth model).",
        code=("controlroom.controls.spatial.depth_to_image:DepthToImage",),
        recipe="controlroom.training.recipes.theatre_depth2img:TheatreDepth2Img",
        signals=("depth",),
        backbones=SD,
        weights_licence="OpenRAIL++",
        status="working",
        no_neutral="its checkpoint has five input channels and needs the depth",
        proof="parity with diffusers' StableDiffusionDepth2ImgPipeline",
    ),
    System(
        number=32,
        key="multidiffusion",
        name="MultiDiffusion",
        papers=(Paper("MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", "2302.08113"),),
        does="Panoramas, any aspect ratio, regions.",
        code=("controlroom.controls.regions.multidiffusion:MultiDiffusion",),
        backbones=SD,
        status="working",
        neutral="one window over the whole picture",
        proof="parity with diffusers' StableDiffusionPanoramaPipeline, also seamless; regions and bootstrapping "
        "against the published loop, written out in the test",
        effect="4:1, n=6: seam 1.19 (1: none), 1.08 puppets in each width; two regions, n=24: right in 0.521 (the "
        "caption alone 0.708)",
    ),
    System(
        number=33,
        key="textual_inversion",
        name="Textual Inversion",
        papers=(
            Paper(
                "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
                "2208.01618",
            ),
        ),
        does="A pseudo-word for a concept.",
        code=("controlroom.controls.personal.textual_inversion:TextualInversion",),
        recipe="controlroom.training.recipes.textual_inversion:TextualInversionRecipe",
        backbones=SD,
        weights_licence="that of each file",
        status="working",
        neutral="leave its word out of the prompt",
        proof="parity with diffusers' load_textual_inversion; one step of the loss against the formula",
    ),
    System(
        number=34,
        key="prompt_weighting",
        name="Prompt weighting",
        does="More or less of a word, in the notation of A1111 or Compel.",
        code=("controlroom.controls.guidance.prompt_weighting:PromptWeighting",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="transcriptions of A1111's rules and numbers that compel 2.5.1 gave, on tiny random weights; diffusers' "
        "pipelines given the transcription's embeddings; any text is read and written again, or refused with a place",
        effect="n=48, on an earlier checkpoint: right in 77.1, 91.7, 93.8, 93.8, 89.6 % at weights 0.5 to 1.5",
    ),
    System(
        number=35,
        key="prompt_to_prompt",
        name="Prompt-to-Prompt",
        papers=(Paper("Prompt-to-Prompt Image Editing with Cross Attention Control", "2208.01626"),),
        does="Swap, refine and re-weight words, with local blend.",
        code=("controlroom.controls.editing.prompt_to_prompt:PromptToPrompt",),
        backbones=SD,
        status="working",
        neutral="cross_replace=0, self_replace=0",
        proof="transcription of the published edit that materialises probabilities, in the test",
        effect="n=64: one colour swapped in 96.9 % [89.3, 99.1], outside 8.9 dB [8.2, 9.7] nearer to the source "
        "than prompting again",
    ),
    System(
        number=36,
        key="inversion",
        name="Inversion",
        papers=(
            Paper("Denoising Diffusion Implicit Models", "2010.02502"),
            Paper("Null-text Inversion for Editing Real Images using Guided Diffusion Models", "2211.09794"),
        ),
        does="The noise that a picture came from: DDIM, regularised, and null-text.",
        code=(
            "controlroom.sampling.inversion:invert",
            "controlroom.sampling.null_text:optimise_null_text",
            "controlroom.controls.editing.from_inversion:FromInversion",
        ),
        backbones=SD,
        status="working",
        no_neutral=_PROGRAM,
        proof="parity with diffusers' DDIMInverseScheduler (bit for bit) and StableDiffusionPix2PixZeroPipeline.invert;"
        " transcription of the published null-text optimisation and of editing from it, in the test",
        effect="n=8, on an earlier checkpoint: null-text comes back 0.2 dB [0.1, 0.3] below the autoencoder, "
        "guided DDIM 12.1 dB, DDIM without guidance 2.6 dB, regularised 7.4 dB",
    ),
    System(
        number=37,
        key="dreambooth_lora",
        name="DreamBooth-LoRA",
        papers=(DREAMBOOTH, Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")),
        does="DreamBooth with low-rank factors.",
        code=("controlroom.controls.personal.lora:LoRA",),
        recipe="controlroom.training.recipes.dreambooth_lora:DreamBoothLoRA",
        backbones=SD,
        weights_licence="that of each file",
        status="working",
        neutral=SCALE_0,
        proof="only the factors move; a broken run continues bit for bit; files draw the same here and in diffusers",
    ),
    System(
        number=38,
        key="dco",
        name="DCO",
        papers=(
            Paper(
                "Direct Consistency Optimization for Robust Customization of Text-to-Image Diffusion Models",
                "2402.12004",
            ),
        ),
        does="Direct consistency optimisation, consistency guidance, merging without interference.",
        code=("controlroom.controls.guidance.consistency_guidance:ConsistencyGuidance",),
        recipe="controlroom.training.recipes.dco:DCORecipe",
        backbones=SD,
        status="working",
        neutral="an empty window",
        proof="the published loss and guidance, transcribed in the test with two networks; files load in diffusers",
    ),
    System(
        number=39,
        key="style_aligned",
        name="StyleAligned",
        papers=(Paper("Style Aligned Image Generation via Shared Attention", "2312.02133"),),
        does="A consistent style over a set, or from a reference.",
        code=("controlroom.controls.style.style_aligned:StyleAligned",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published shared attention, AdaIN and norms in the test",
        effect="n=24: no set takes over the style (0 %); colours and background come over, strokes do not",
    ),
    System(
        number=40,
        key="ms_diffusion",
        name="MS-Diffusion",
        papers=(
            Paper("MS-Diffusion: Multi-subject Zero-shot Image Personalization with Layout Guidance", "2406.07209"),
        ),
        does="Several subjects with boxes.",
        code=("controlroom.controls.regions.ms_diffusion:MSDiffusion",),
        recipe="controlroom.training.recipes.ms_diffusion:MSDiffusionRecipe",
        backbones=SD,
        weights_licence=UNCHECKED,
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published resampler and masked cross-attention in the test",
    ),
    System(
        number=41,
        key="kosmos_g",
        name="KOSMOS-G",
        papers=(Paper("Kosmos-G: Generating Images in Context with Multimodal Large Language Models", "2310.02992"),),
        does="Interleaved images and text through a multimodal language model.",
        code=("controlroom.controls.personal.kosmos_g:KosmosG",),
        recipe="controlroom.training.recipes.kosmos_g:KosmosGRecipe",
        backbones=SD,
        weights_licence=UNCHECKED,
        status="working",
        neutral=SCALE_0,
        proof="transcription of language model, connector, AlignerNet and its two losses in the test, latents of runs",
    ),
    System(
        number=42,
        key="instant_id",
        name="InstantID",
        papers=(Paper("InstantID: Zero-shot Identity-Preserving Generation in Seconds", "2401.07519"),),
        does="Identity of a face with spatial control.",
        code=("controlroom.controls.personal.instant_id:InstantID",),
        recipe="controlroom.training.recipes.instant_id:InstantIDRecipe",
        signals=("face",),
        backbones=SD,
        weights_licence="research only, and so is the face model it needs",
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published stream and side network in the test, latents of whole runs",
    ),
    System(
        number=43,
        key="photomaker",
        name="PhotoMaker",
        papers=(Paper("PhotoMaker: Customizing Realistic Human Photos via Stacked ID Embedding", "2312.04461"),),
        does="Stacked identity embedding.",
        code=("controlroom.controls.personal.photomaker:PhotoMaker",),
        recipe="controlroom.training.recipes.photomaker:PhotoMakerRecipe",
        signals=("face",),
        backbones=SD,
        weights_licence="Apache-2.0",
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published fusion, stacking and delayed merging in the test, latents of whole runs",
    ),
    System(
        number=44,
        key="uni_controlnet",
        name="Uni-ControlNet",
        papers=(Paper("Uni-ControlNet: All-in-One Control to Text-to-Image Diffusion Models", "2305.16322"),),
        does="One local and one global adapter for all conditions.",
        code=("controlroom.controls.spatial.uni_controlnet:UniControlNet",),
        recipe="controlroom.training.recipes.theatre_uni_controlnet:TheatreUniControlNet",
        signals=("canny", "hed", "mlsd", "normal", "depth", "segmentation", "scribble", "pose"),
        backbones=SD,
        weights_licence=UNCHECKED,
        status="working",
        neutral=SCALE_0,
        proof="the published equations (injection at each level, tokens of the content), written out in the test with "
        "a loop by hand, on tiny random weights",
    ),
    System(
        number=45,
        key="rpg",
        name="RPG",
        papers=(
            Paper(
                "Mastering Text-to-Image Diffusion: Recaptioning, Planning, and Generating with Multimodal LLMs",
                "2401.11708",
            ),
        ),
        does="A language model plans regions, each denoised with its sub-prompt.",
        code=("controlroom.controls.regions.regional_prompts:RegionalPrompts",),
        backbones=SD,
        status="working",
        neutral="base_ratio=1",
        proof="transcription of the published code's regional cross-attention, and of the paper's joined latents, in "
        "the test",
        effect="three objects, n=16: all right in 68.8 % by attention (the caption alone: 0); two regions, n=24: 0.646",
    ),
    System(
        number=46,
        key="self_guidance",
        name="Self-Guidance",
        papers=(Paper("Diffusion Self-Guidance for Controllable Image Generation", "2306.00986"),),
        does="Position, size, shape and appearance of a named object.",
        code=("controlroom.controls.guidance.self_guidance:SelfGuidance",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="gradients of the published energies against their closed forms; a run against a loop that is written "
        "out, on tiny random weights",
        effect="n=48: shift reached in 29.2 % [14.9, 49.2], size in none; the rest held 0.908",
    ),
    System(
        number=47,
        key="ladi_vton",
        name="LaDI-VTON",
        papers=(Paper("LaDI-VTON: Latent Diffusion Textual-Inversion Enhanced Virtual Try-On", "2305.13501"),),
        does="Try-on with the garment as pseudo-words and a warped cloth.",
        code=("controlroom.controls.tryon.ladi_vton:LaDIVTON",),
        recipe="controlroom.training.recipes.ladi_vton:LaDIVTONRecipe",
        signals=("pose", "segmentation"),
        backbones=SD2,
        weights_licence="CC BY-NC 4.0, non-commercial",
        no_neutral="its checkpoint has extra input channels and needs the garment",
        proof="theatre garments, where the true picture is known",
    ),
    System(
        number=48,
        key="stable_viton",
        name="StableVITON",
        papers=(
            Paper(
                "StableVITON: Learning Semantic Correspondence with Latent Diffusion Model for Virtual Try-On",
                "2312.01725",
            ),
        ),
        does="Try-on with the garment by zero cross-attention.",
        code=("controlroom.controls.tryon.stable_viton:StableVITON",),
        recipe="controlroom.training.recipes.stable_viton:StableVITONRecipe",
        signals=("pose", "segmentation"),
        backbones=SD1,
        weights_licence="no licence file at the repository's root: ask before use",
        no_neutral="its checkpoint has extra input channels and needs the garment",
        proof="theatre garments, where the true picture is known",
    ),
    System(
        number=49,
        key="idm_vton",
        name="IDM-VTON",
        papers=(Paper("Improving Diffusion Models for Authentic Virtual Try-on in the Wild", "2403.05139"),),
        does="Try-on with a parallel UNet and an IP-Adapter.",
        code=("controlroom.controls.tryon.idm_vton:IDMVTON",),
        recipe="controlroom.training.recipes.idm_vton:IDMVTONRecipe",
        signals=("pose", "segmentation"),
        backbones=SDXL,
        weights_licence="CC BY-NC-SA 4.0, non-commercial",
        no_neutral="its checkpoint has extra input channels and needs the garment",
        proof="theatre garments, where the true picture is known",
    ),
    System(
        number=50,
        key="bootcomp",
        name="BootComp",
        papers=(Paper("Controllable Human Image Generation with Personalized Multi-Garments", "2411.16801"),),
        does="Several garments, from synthetic pairs, in any pose and style.",
        code=("controlroom.controls.tryon.bootcomp:BootComp",),
        recipe="controlroom.training.recipes.bootcomp:BootCompRecipe",
        signals=("pose",),
        backbones=SDXL,
        weights_licence="CC BY-NC-SA 4.0, non-commercial",
        neutral=SCALE_0,
        proof="theatre garments, where the true picture is known",
    ),
    System(
        number=51,
        key="dreamfusion",
        name="DreamFusion, ProlificDreamer",
        papers=(
            Paper("DreamFusion: Text-to-3D using 2D Diffusion", "2209.14988"),
            Paper(
                "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
                "2305.16213",
            ),
        ),
        does="Text to 3D by score distillation: SDS and VSD.",
        code=("controlroom.threed.distillation:ScoreDistiller",),
        backbones=SD,
        no_neutral=_PROGRAM,
        proof="closed-form Gaussian denoisers; views of theatre objects",
    ),
    System(
        number=52,
        key="magic3d",
        name="Magic3D, DreamFlow",
        papers=(
            Paper("Magic3D: High-Resolution Text-to-3D Content Creation", "2211.10440"),
            Paper("DreamFlow: High-Quality Text-to-3D Generation by Approximating Probability Flow", "2403.14966"),
        ),
        does="Coarse to fine, mesh; probability-flow schedule.",
        code=("controlroom.threed.meshes:TetMesh", "controlroom.threed.distillation:ScoreDistiller"),
        backbones=SD,
        no_neutral=_PROGRAM,
        proof="closed-form Gaussian denoisers; silhouettes of known shapes",
    ),
    System(
        number=53,
        key="mvdream",
        name="MVDream",
        papers=(Paper("MVDream: Multi-view Diffusion for 3D Generation", "2308.16512"),),
        does="Multi-view diffusion as the prior.",
        code=("controlroom.threed.mvdream:MultiViewUNet",),
        recipe="controlroom.training.recipes.mvdream:MVDreamRecipe",
        backbones=SD2,
        weights_licence=UNCHECKED,
        no_neutral=_MODEL,
        proof="one view equals the plain network; views of theatre objects",
    ),
)

FURTHER: tuple[System, ...] = (
    System(
        number=54,
        key="perturbed_attention_guidance",
        name="Perturbed-attention guidance",
        papers=(Paper("Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", "2403.17377"),),
        does="Guidance away from a prediction whose self-attention sees only itself.",
        code=("controlroom.controls.guidance.perturbed_attention_guidance:PerturbedAttentionGuidance",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionPAGPipeline and StableDiffusionXLPAGPipeline",
    ),
    System(
        number=55,
        key="smoothed_energy_guidance",
        name="Smoothed energy guidance",
        papers=(
            Paper(
                "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention",
                "2408.00760",
            ),
        ),
        does="Guidance away from a prediction whose self-attention has blurred queries.",
        code=("controlroom.controls.guidance.smoothed_energy_guidance:SmoothedEnergyGuidance",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published equations in the test, on tiny random weights",
    ),
    System(
        number=56,
        key="perp_neg",
        name="Perp-Neg",
        papers=(
            Paper(
                "Re-imagine the Negative Prompt Algorithm: Transform 2D Diffusion into 3D, alleviate Janus problem and "
                "Beyond",
                "2304.04968",
            ),
        ),
        does="Negative prompts that take nothing from the prompt: only their perpendicular part is subtracted.",
        code=("controlroom.controls.guidance.perp_neg:PerpNeg",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="transcription of the published equations in the test, on tiny random weights",
    ),
    System(
        number=57,
        key="guidance_rescale",
        name="Rescaled guidance",
        papers=(Paper("Common Diffusion Noise Schedules and Sample Steps are Flawed", "2305.08891"),),
        does="Brings the deviation of the guided prediction back towards that of the prediction with the prompt.",
        code=("controlroom.controls.guidance.guidance_rescale:GuidanceRescale",),
        backbones=SD,
        status="working",
        neutral=SCALE_0,
        proof="parity with guidance_rescale of diffusers' pipelines",
    ),
    System(
        number=58,
        key="guidance_interval",
        name="Guidance interval",
        papers=(
            Paper(
                "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models",
                "2404.07724",
            ),
        ),
        does="Classifier-free guidance only in an interval of the steps; outside it the rows without the prompt are "
        "not run.",
        code=("controlroom.controls.guidance.guidance_interval:GuidanceInterval",),
        backbones=SD,
        status="working",
        neutral="guidance_start=0, guidance_end=1",
        proof="a loop of diffusers' parts by hand, on tiny random weights",
    ),
    System(
        number=59,
        key="image_to_image",
        name="Image to image",
        papers=(
            Paper("SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", "2108.01073"),
        ),
        does="Starts from a picture that is noised to the middle of the schedule.",
        code=("controlroom.controls.editing.image_to_image:ImageToImage",),
        backbones=SD,
        status="working",
        no_neutral="the run starts from another place than noise",
        proof="parity with diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionXLImg2ImgPipeline",
    ),
    System(
        number=60,
        key="inpaint",
        name="Inpainting",
        papers=(
            Paper("High-Resolution Image Synthesis with Latent Diffusion Models", "2112.10752"),
            Paper("RePaint: Inpainting using Denoising Diffusion Probabilistic Models", "2201.09865"),
        ),
        does="Draws a part of a picture anew: by a network that reads the mask, or by putting the rest back.",
        code=("controlroom.controls.editing.inpaint:Inpaint",),
        recipe="controlroom.training.recipes.theatre_inpaint:TheatreInpaint",
        backbones=SD,
        weights_licence="CreativeML OpenRAIL-M",
        status="working",
        no_neutral="the run keeps a given picture outside of the mask",
        proof="parity with diffusers' StableDiffusionInpaintPipeline and StableDiffusionXLInpaintPipeline, with nine "
        "channels and with four",
    ),
    System(
        number=61,
        key="lora",
        name="LoRA and its relatives",
        papers=(
            Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"),
            Paper("FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", "2108.06098"),
            Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353"),
        ),
        does="Draws with what a LoRA, LoCon, LoHa, LoKr or DoRA file learned.",
        code=("controlroom.controls.personal.lora:LoRA",),
        recipe="controlroom.training.recipes.lora:LoRARecipe",
        backbones=SD,
        weights_licence="that of each file",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' load_lora_weights and with PEFT's layers; files of five tools, every key "
        "accounted for; what is written loads in diffusers",
    ),
    System(
        number=62,
        key="learned_words",
        name="Learned words",
        papers=(
            Paper(
                "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
                "2208.01618",
            ),
        ),
        does="Draws with words that were learned by Textual Inversion.",
        code=("controlroom.controls.personal.textual_inversion:TextualInversion",),
        backbones=SD,
        weights_licence="that of each file",
        status="working",
        no_neutral="a word stands in the prompt or does not",
        proof="parity with diffusers' load_textual_inversion; four kinds of files",
    ),
    System(
        number=63,
        key="gligen",
        name="GLIGEN",
        papers=(Paper("GLIGEN: Open-Set Grounded Text-to-Image Generation", "2301.07093"),),
        does="Phrases in boxes, on networks with gated layers.",
        code=("controlroom.controls.spatial.gligen:Gligen",),
        backbones=SD,
        weights_licence="CreativeML OpenRAIL-M",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionGLIGENPipeline",
    ),
)
"""Controls beside the project's systems, listed with them where controls are listed."""

# The `type` of a control in a run file -> its class. One line for each control that can be named there.
CONTROL_TYPES: dict[str, str] = {
    "appearance_control": "controlroom.controls.pose.appearance:AppearanceControl",
    "attend_and_excite": "controlroom.controls.guidance.attend_and_excite:AttendAndExcite",
    "consistency_guidance": "controlroom.controls.guidance.consistency_guidance:ConsistencyGuidance",
    "blip_diffusion": "controlroom.controls.personal.blip_diffusion:BLIPDiffusion",
    "controlnet": "controlroom.controls.spatial.controlnet:ControlNet",
    "depth_to_image": "controlroom.controls.spatial.depth_to_image:DepthToImage",
    "cross_image_attention": "controlroom.controls.style.cross_image_attention:CrossImageAttention",
    "ctrl_x": "controlroom.controls.style.ctrl_x:CtrlX",
    "from_inversion": "controlroom.controls.editing.from_inversion:FromInversion",
    "gligen": "controlroom.controls.spatial.gligen:Gligen",
    "guidance_interval": "controlroom.controls.guidance.guidance_interval:GuidanceInterval",
    "guidance_rescale": "controlroom.controls.guidance.guidance_rescale:GuidanceRescale",
    "image_to_image": "controlroom.controls.editing.image_to_image:ImageToImage",
    "imagic": "controlroom.controls.editing.imagic:Imagic",
    "inpaint": "controlroom.controls.editing.inpaint:Inpaint",
    "instant_id": "controlroom.controls.personal.instant_id:InstantID",
    "instruct_pix2pix": "controlroom.controls.editing.instruct_pix2pix:InstructPix2Pix",
    "ip_adapter": "controlroom.controls.personal.ip_adapter:IPAdapter",
    "kosmos_g": "controlroom.controls.personal.kosmos_g:KosmosG",
    "lora": "controlroom.controls.personal.lora:LoRA",
    "masactrl": "controlroom.controls.editing.masactrl:MasaCtrl",
    "ms_diffusion": "controlroom.controls.regions.ms_diffusion:MSDiffusion",
    "multidiffusion": "controlroom.controls.regions.multidiffusion:MultiDiffusion",
    "perp_neg": "controlroom.controls.guidance.perp_neg:PerpNeg",
    "perturbed_attention_guidance": (
        "controlroom.controls.guidance.perturbed_attention_guidance:PerturbedAttentionGuidance"
    ),
    "photomaker": "controlroom.controls.personal.photomaker:PhotoMaker",
    "pix2pix_zero": "controlroom.controls.editing.pix2pix_zero:Pix2PixZero",
    "prompt_to_prompt": "controlroom.controls.editing.prompt_to_prompt:PromptToPrompt",
    "prompt_weighting": "controlroom.controls.guidance.prompt_weighting:PromptWeighting",
    "reference_only": "controlroom.controls.style.reference_only:ReferenceOnly",
    "regional_prompts": "controlroom.controls.regions.regional_prompts:RegionalPrompts",
    "self_attention_guidance": "controlroom.controls.guidance.self_attention_guidance:SelfAttentionGuidance",
    "self_guidance": "controlroom.controls.guidance.self_guidance:SelfGuidance",
    "semantic_guidance": "controlroom.controls.guidance.semantic_guidance:SemanticGuidance",
    "smoothed_energy_guidance": "controlroom.controls.guidance.smoothed_energy_guidance:SmoothedEnergyGuidance",
    "style_aligned": "controlroom.controls.style.style_aligned:StyleAligned",
    "t2i_adapter": "controlroom.controls.spatial.t2i_adapter:T2IAdapter",
    "uni_controlnet": "controlroom.controls.spatial.uni_controlnet:UniControlNet",
    "textual_inversion": "controlroom.controls.personal.textual_inversion:TextualInversion",
    "unimo_g": "controlroom.controls.personal.unimo_g:UnimoG",
    "upscale": "controlroom.controls.editing.upscale:Upscale",
}


def load(path: str) -> Any:
    """Import what a dotted path of the catalogue (``module:Name``) names.

    >>> load("controlroom.core.errors:InputError").__name__
    'InputError'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def control_class(type_name: str) -> type:
    """Return the class of the control that a run file calls ``type_name``.

    Raises:
        InputError: no control has that name (the message lists the nearest ones), or it is not in this version yet.
    """
    path = CONTROL_TYPES.get(type_name) if isinstance(type_name, str) else None
    if path is None:
        raise InputError(f"Unknown control type {_shown(type_name)}. {_suggestion(type_name, CONTROL_TYPES)}")
    # Only a file that is not there means "not yet"; an import that fails inside the file must be seen as what it is.
    if not _exists(path.partition(":")[0]):
        raise InputError(
            f"The control {type_name!r} is in the catalogue but not in this version of controlroom yet. "
            "Leave it out, or see docs/systems.md for what works."
        )
    return load(path)


def system(key: str) -> System:
    """Return the entry of the catalogue with this key.

    Raises:
        InputError: there is none; the message lists the nearest ones.

    >>> system("ddpm").papers[0].url
    'https://arxiv.org/abs/2006.11239'
    """
    by_key = {entry.key: entry for entry in (*SYSTEMS, *FURTHER)}
    if key not in by_key:
        raise InputError(f"Unknown system {_shown(key)}. {_suggestion(key, by_key)}")
    return by_key[key]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        # A folder on the way is missing; any other missing module is a broken import of a file that exists.
        if error.name and module.startswith(error.name + "."):
            return False
        raise


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggestion(name: object, known: dict[str, Any]) -> str:
    """Name what was probably meant, whatever the case and the separators, or everything that is known."""

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "").replace(" ", "")

    names = {plain(each): each for each in known}
    near = difflib.get_close_matches(plain(name[:100]), names, n=3, cutoff=0.6) if isinstance(name, str) else []
    if near:
        return f"Did you mean {' or '.join(repr(names[each]) for each in near)}?"
    return f"Known are: {', '.join(sorted(known))}."

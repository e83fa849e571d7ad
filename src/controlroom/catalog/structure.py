"""Structure, appearance, style and regions: what a picture follows, and where."""

from __future__ import annotations

from controlroom.catalog.entry import CONTROLNET, SCALE_0, SD, TASK, UNCHECKED, Paper, System

ENTRIES: tuple[System, ...] = (
    System(
        number=6,
        key="controlnet",
        name="ControlNet",
        papers=(CONTROLNET,),
        does="Draws along condition maps (canny, hed, mlsd, normal, depth, segmentation, scribble, pose), several at "
        "once.",
        code=("controlroom.controls.spatial.controlnet:ControlNet",),
        recipe="controlroom.training.recipes.controlnet:ControlNetRecipe",
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
        recipe="controlroom.training.recipes.t2i_adapter:T2IAdapterRecipe",
        signals=("canny", "depth", "scribble", "pose"),
        backbones=SD,
        weights_licence="Apache-2.0",
        status="working",
        neutral=SCALE_0,
        proof="parity with diffusers' StableDiffusionAdapterPipeline and StableDiffusionXLAdapterPipeline: full, light "
        "and XL adapters, several at once",
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
        no_neutral=TASK,
        proof="parity with diffusers' StableDiffusionControlNetImg2ImgPipeline",
        effect="n=8: half precision, UniPC in 20 steps and estimated depth cost next to nothing; without depth it "
        "falls from 0.874 to 0.784",
    ),
    System(
        number=31,
        key="depth_to_image",
        name="Depth2Image",
        papers=(Paper("High-Resolution Image Synthesis with Latent Diffusion Models", "2112.10752"),),
        does="A variation that keeps the depth (Stable Diffusion 2's depth model).",
        code=("controlroom.controls.spatial.depth_to_image:DepthToImage",),
        recipe="controlroom.training.recipes.depth2img:Depth2ImgRecipe",
        signals=("depth",),
        backbones=SD,
        weights_licence="OpenRAIL++",
        status="working",
        no_neutral="its checkpoint has five input channels and needs the depth",
        proof="parity with diffusers' StableDiffusionDepth2ImgPipeline",
        effect="n=48: depth kept 0.874 [0.866, 0.882] (rank correlation; without it 0.750), the change made in 93.8 % "
        "[83.2, 97.9]",
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
        number=44,
        key="uni_controlnet",
        name="Uni-ControlNet",
        papers=(Paper("Uni-ControlNet: All-in-One Control to Text-to-Image Diffusion Models", "2305.16322"),),
        does="One local and one global adapter for all conditions.",
        code=("controlroom.controls.spatial.uni_controlnet:UniControlNet",),
        recipe="controlroom.training.recipes.uni_controlnet:UniControlNetRecipe",
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

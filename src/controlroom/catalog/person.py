"""Retargeting a person: the task, its controls and baselines, poses and their data."""

from __future__ import annotations

from controlroom.catalog.entry import CONTROLNET, DATA, IP_ADAPTER, MAGICPOSE, SCALE_0, SD, TASK, Paper, System

ENTRIES: tuple[System, ...] = (
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
        no_neutral=TASK,
        proof="the run it builds, its poses of every kind and its files, on tiny random weights; scales of 0 are a run "
        "of words alone",
        effect="n=300: PCK@0.2 98.6 %; of nine attributes of the person top colour 99.0 %, skin 98.0, lower colour "
        "97.0, pattern 96.0, lower garment 92.3, hair colour 92.0, hair length 90.3, kind of top 86.3, hat "
        "79.0 (reference-only: 38.7 to 70.7); the place 100",
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
        effect="n=300, beside a pose ControlNet: each of nine attributes of the person 25 to 88 points above that "
        "ControlNet alone, SSIM to the true picture 0.667 (0.147)",
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
        no_neutral=DATA,
        proof="round trips of every format; the reader's error on held-out renders and doodles",
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
        no_neutral=TASK,
        proof="both controls at once against diffusers' pipeline, on tiny random weights",
        effect="n=300: PCK@0.2 97.9 %; of nine attributes of the person 30.3 to 65.3 %; the place 89.0",
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
        no_neutral=DATA,
        proof="each metric against an independent implementation; readers against written sample folders",
    ),
)

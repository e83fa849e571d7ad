"""What type checkers must accept and refuse of a control's arguments. Read by pyright (``make check``), never run.

An ignore that is not needed is an error here, so each marks a call that a typed user is warned of.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

from typing import Any

import controlroom as cr


def accepted(net: Any) -> list[cr.Control]:
    return [
        cr.ControlNet(net, "pose.json"),
        cr.ControlNet(net, "pose.json", 0.5, 0.0, 0.8, guess_mode=True),
        cr.ControlNet(model=net, image="pose.json", scale=1),
        cr.IPAdapter(net, "face.png", scale=[0.5, 1.0]),
        cr.PromptToPrompt("a cat", 0.4, (0.1, 0.4), {"cat": 2.0}),
        cr.AttendAndExcite([2, 5]),
        cr.AttendAndExcite(words=["cat"]),
        cr.AppearanceControl("anna.png"),
        cr.ReferenceOnly("anna.png", 0.5),
        cr.InstructPix2Pix("anna.png", 1.2),
        cr.ImageToImage("anna.png", strength=0.5),
        cr.Upscale(net, 0.3, "latents"),
        cr.Imagic("runs/anna", [0.6, 0.8], network="base"),
        cr.SemanticGuidance([cr.SemanticEdit("smiling", True, 3.0, warmup=5)], momentum_scale=0.2),
        cr.PerturbedAttentionGuidance(3.0, ["mid"]),
        cr.PerpNeg(["night", "a hat"], [1.0, 0.5]),
    ]


def refused(net: Any) -> None:
    cr.ControlNet(net)  # pyright: ignore[reportCallIssue]
    cr.ControlNet(net, "pose.json", "strong")  # pyright: ignore[reportArgumentType]
    cr.ControlNet(net, "pose.json", strength=1.0)  # pyright: ignore[reportCallIssue]
    cr.PromptToPrompt(7)  # pyright: ignore[reportArgumentType]
    cr.SemanticEdit()  # pyright: ignore[reportCallIssue]
    cr.SemanticEdit("smiling").scale = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    cr.ReferenceOnly("anna.png").scale = 2.0  # pyright: ignore[reportAttributeAccessIssue]

"""/v1/lab: draw the masks of a clip at chosen settings."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from statistics import fmean
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from amd.artifacts.discovery import encoder_folder
from amd.flops import StepFlops
from amd.lab.cost import compare_cost
from amd.training.run_folder import run_folder
from service.auth.authentication import Inferrer
from service.jobs.routes import Jobs, Locations
from service.lab.gateway import LabGateway
from service.lab.requests import read_lab_request
from service.lab.schemas import (
    LabAlignment,
    LabClip,
    LabCost,
    LabFlops,
    LabMask,
    LabOptions,
    LabRequest,
    LabTokenSets,
    LabView,
)
from service.lab.sources import LabSource, check_teacher, resolve_source
from service.registry.routes import EncodersDep
from service.serving.protocol import PNG
from service.serving.requests import FORM
from service.serving.routes import body_schema
from service.web.binary import BINARY
from service.web.request_bodies import run_by_size

router = APIRouter(prefix="/lab", tags=["lab"])

FILE = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}},
    "required": ["file"],
}


async def _lab(request: Request) -> LabGateway:
    lab: LabGateway = request.app.state.lab
    return lab


LabDep = Annotated[LabGateway, Depends(_lab)]


@router.post(
    "/masks",
    summary="Draw the masks of an image or video",
    openapi_extra={
        "requestBody": {
            "required": False,
            "content": {
                "image/*": BINARY,
                "video/*": BINARY,
                "application/octet-stream": BINARY,
                FORM: {"schema": FILE},
                "application/json": {"schema": body_schema(LabRequest)},
            },
        }
    },
)
async def draw_masks(
    request: Request,
    response: Response,
    caller: Inferrer,
    lab: LabDep,
    jobs: Jobs,
    encoders: EncodersDep,
    policy: Locations,
) -> LabView:
    """Show what the student and teacher see at the given mask settings, the reconstructed tokens, and the compute cost.

    The masks are those that training on a CPU samples for the same seed, step, batch size and position in the batch.
    Options are query parameters, form fields or members of the JSON body. Without a file, masks are drawn on a
    single-coloured clip. No encoder needs to be deployed; the first request waits for the lab's replica to start.
    """
    options, item = await read_lab_request(request, policy, caller.project)
    if options.job is not None or (item is not None and "uri" in item):
        caller.require("read")  # the response shows what they contain
    source = await run_in_threadpool(resolve_source, options, jobs, encoders, caller.project)
    if options.alignment and source.job is not None:
        await run_in_threadpool(check_teacher, source.baseline, policy, source.job.project)
    if item is None and options.record is not None and source.job is not None:
        item = {"record": options.record, "data": source.job.config["data"]}
    root = request.app.state.settings.root
    call = {
        "config": source.config.model_dump(mode="json"),
        "step": options.step,
        "position": options.position,
        "deadline_s": options.deadline_s,
        "model": _model(source, options, root),
        "item": item,
    }
    reply = await lab.view(request, call, len((item or {}).get("content", b"")))
    # Compressing PNGs would keep the event loop busy without making the response smaller.
    response.headers["Content-Encoding"] = "identity"
    size = sum(map(len, reply["layers"].values()))
    return await run_by_size(size, _view, source, options, reply)


def _model(source: LabSource, options: LabOptions, root: str) -> dict[str, Any] | None:
    """Return the location of the model that reconstructs pixels or is aligned, or None if the request uses no model."""
    if source.encoder is not None:
        return {"encoder": encoder_folder(root, source.encoder)}
    if options.checkpoint is not None and source.job is not None:
        return {
            "run": run_folder(root, source.job.id),
            "checkpoint": options.checkpoint,
            "config": source.baseline.model_dump(mode="json"),
            "alignment": options.alignment,
        }
    return None


def _view(source: LabSource, options: LabOptions, reply: Mapping[str, Any]) -> LabView:
    config, clip = source.config, source.config.clip
    cost = compare_cost(config, source.baseline)
    return LabView(
        preset=source.preset,
        job=source.job.id if source.job is not None else None,
        encoder=source.encoder,
        checkpoint=options.checkpoint,
        mask=LabMask(
            **config.mask.model_dump(),
            seed=config.seed,
            step=options.step,
            batch_size=config.optim.batch_size,
            position=options.position,
            clips_per_step=config.clips_per_step,
        ),
        clip=LabClip(
            frames=clip.frames,
            height=clip.size[0],
            width=clip.size[1],
            tubelet=clip.tubelet,
            patch=clip.patch,
            grid=clip.grid,
        ),
        token_sets=LabTokenSets(**reply["token_sets"]),
        cost=LabCost(
            flops=_flops(cost.flops),
            baseline=_flops(cost.baseline),
            baseline_student_ratio=source.baseline.mask.student_ratio,
            baseline_teacher_ratio=source.baseline.mask.teacher_ratio,
            relative=cost.relative,
        ),
        columns=reply["columns"],
        layers={name: f"data:{PNG};base64,{base64.b64encode(png).decode()}" for name, png in reply["layers"].items()},
        loss=reply["loss"],
        errors=reply["errors"],
        alignment=_alignment(reply["alignment"]),
    )


def _alignment(tokens: Mapping[str, list[float]] | None) -> LabAlignment | None:
    if tokens is None:
        return None
    direct, generation = tokens["direct"], tokens["generation"]
    return LabAlignment(
        direct=fmean(direct),
        generation=fmean(generation) if generation else None,
        direct_tokens=direct,
        generation_tokens=generation,
    )


def _flops(flops: StepFlops) -> LabFlops:
    return LabFlops(**flops._asdict(), total=flops.total)

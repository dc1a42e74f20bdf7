"""List and read the pictures that a run writes while it trains. Their content is checked, because a job writes them."""

from __future__ import annotations

from amd.training.reporting.media_files import DamagedPicture, PictureName, media_steps, read_picture
from amd.training.run_folder import run_folder
from service.jobs.details.schemas import MediaStepView, PictureView
from service.web.errors import NotFound, Refusal


def list_media(root: str, job_id: str) -> list[MediaStepView]:
    """Return the steps with pictures, ascending."""
    return [
        MediaStepView(step=step, files=[PictureView(name=name, bytes=size) for name, size in sizes.items()])
        for step, sizes in media_steps(run_folder(root, job_id))
    ]


def read(root: str, job_id: str, step: int, name: PictureName) -> bytes:
    """Return one picture. Raises NotFound if it does not exist, or Refusal if the file is not a picture."""
    try:
        return read_picture(run_folder(root, job_id), step, name)
    except FileNotFoundError:
        raise NotFound(
            f"step {step} of {job_id} has no {name}; GET /v1/jobs/{job_id}/media lists the pictures"
        ) from None
    except DamagedPicture as error:
        raise Refusal("not_possible", f"{error}; the file cannot be shown") from None

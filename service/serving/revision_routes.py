"""Routes for the revisions of a deployment: list them, and roll the deployment back to one of them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from service.auth.authentication import Reader, Submitter
from service.db.models import DeploymentRevision
from service.jobs.routes import Config
from service.registry.routes import EncodersDep
from service.serving.deployments import etag_of
from service.serving.protocol import MAIN
from service.serving.reservations import check_quotas
from service.serving.revisions import cannot_restore, revision_views
from service.serving.routes import (
    DeploymentName,
    DeploymentsDep,
    IfMatch,
    check_capacity,
    deployment_view,
    desired_deployment,
    resolve_encoders,
)
from service.serving.schemas import DeploymentRequest, DeploymentView, RevisionList, RollbackRequest
from service.web.errors import NotFound, Refusal

router = APIRouter(prefix="/deployments", tags=["deployments"])


@router.get("/{name}/revisions", summary="List a deployment's revisions, newest first")
def list_revisions(name: DeploymentName, caller: Reader, store: DeploymentsDep) -> RevisionList:
    """Each change of the settings adds a revision. The newest 100 are kept until the deployment is deleted."""
    return RevisionList(items=revision_views(store.revisions(name, caller.project)))


@router.post("/{name}/rollback", status_code=202, summary="Restore the settings of an earlier revision")
def roll_back(
    name: DeploymentName,
    body: RollbackRequest,
    caller: Submitter,
    store: DeploymentsDep,
    encoders: EncodersDep,
    settings: Config,
    request: Request,
    response: Response,
    if_match: IfMatch = None,
) -> DeploymentView:
    """Apply the revision's settings as a new revision, with the same checks and errors as for an update.

    If the revision names an alias, the deployment follows the alias, which may have moved. If its encoder no longer
    exists, or if the alias has moved to the revision's candidate, the response is 422 `not_possible`. `If-Match` has
    the same effect as on an update.
    """
    project = store.get(name, caller.project).project
    revision = store.revision(name, project, body.revision)
    desired = _request_of(revision)
    try:
        resolved = resolve_encoders(desired, project, encoders)
    except NotFound as error:
        raise _not_possible(revision, error.message) from None
    if cannot_restore(resolved, revision.resolved):
        reason = f"encoder={desired.encoder} and candidate={desired.candidate} now refer to {resolved[MAIN]}"
        raise _not_possible(revision, reason, "move the alias back first, or restore another revision")
    deployment = desired_deployment(name, project, caller.id, desired)
    check_capacity(deployment, store, settings, request)
    stored, _ = store.put(deployment, if_match, check_quotas, resolved, restored=revision.number)
    response.headers["ETag"] = etag_of(stored)
    return deployment_view(stored)


def _request_of(revision: DeploymentRevision) -> DeploymentRequest:
    """Return the request for a revision's settings. Raises Refusal if they break a rule that was added since."""
    values = {"encoder": revision.encoder, "candidate": revision.candidate, "share": revision.share}
    try:
        return DeploymentRequest.model_validate({**revision.settings, **values})
    except ValidationError as error:
        raise _not_possible(revision, error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _not_possible(revision: DeploymentRevision, reason: str, remedy: str = "restore another revision") -> Refusal:
    message = f"revision {revision.number} cannot be restored: {reason}; {remedy}"
    return Refusal("not_possible", message)

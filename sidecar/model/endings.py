"""What `spanlock explain` says of the words that receipts, `workflows` and the audit log end with."""

from sidecar.errors import Explanation
from sidecar.model.lease import IssuerOutcome
from sidecar.model.workflow import CloseReason

CLOSED_BY: dict[CloseReason, Explanation] = {
    CloseReason.CLOSED: Explanation("The workflow was closed by its own agent.", "Nothing to do."),
    CloseReason.HOLDER_GONE: Explanation(
        "Whoever held the workflow open went away without closing it: it crashed, was killed, or its connection ended.",
        "Find out why the agent ended; its credentials are dropped and revoked as by a close.",
    ),
    CloseReason.SPAN_ENDED: Explanation(
        "The workflow's root span ended: it arrived at the OTLP receiver, or the client's span processor closed it.",
        "Nothing to do.",
    ),
    CloseReason.MAX_AGE: Explanation(
        "The workflow reached its greatest age.", "Open a new one, or raise `workflows.max_age`."
    ),
    CloseReason.IDLE: Explanation(
        "The workflow had no call and no renewal for too long.", "Renew it while it works, or raise `workflows.idle`."
    ),
    CloseReason.OPERATOR: Explanation("An operator closed the workflow.", "Ask who operates the sidecar."),
    CloseReason.AGENT_REMOVED: Explanation(
        "A reload removed the workflow's agent from the configuration.", "Declare it under `agents:` again."
    ),
    CloseReason.SHUTDOWN: Explanation("The sidecar was shut down.", "Open a new workflow after its restart."),
    CloseReason.SIDECAR_RESTARTED: Explanation(
        "The sidecar ended without a shutdown while the workflow was open. The tokens that it had then live to their expiry.",
        "Open a new workflow; find out why the sidecar ended.",
    ),
}

AT_THE_ISSUER: dict[IssuerOutcome, Explanation] = {
    IssuerOutcome.CONFIRMED: Explanation(
        "The credential is dead: the same look-up said active before its revocation and inactive after it.",
        "Nothing to do.",
    ),
    IssuerOutcome.ACKNOWLEDGED: Explanation(
        "The issuer accepted the revocation, and no look-up could prove it: it has no introspection for us, or refuses it, or "
        "says inactive to whoever asks.",
        "Give the tool `introspection` with its own client; check its secret_file.",
    ),
    IssuerOutcome.LOCAL_ONLY: Explanation(
        "It is dropped here, and nobody can revoke it: a static secret, or an issuer without a revocation endpoint.",
        "Rotate it at its source if it may have been seen.",
    ),
    IssuerOutcome.EXPIRED: Explanation(
        "The credential's own expiry passed before a revocation succeeded.", "Check the issuer; see `spanlock status`."
    ),
    IssuerOutcome.FAILED: Explanation(
        "The credential was not revoked within `credentials.revoke_deadline`; it is tried again until its own expiry.",
        "Check the issuer; see `spanlock status` for the backlog and the last error.",
    ),
    IssuerOutcome.NOT_ISSUED: Explanation(
        "The exchange gave no credential: there is none to revoke.", "Nothing to do."
    ),
    IssuerOutcome.MINT_UNKNOWN: Explanation(
        "The issuer may have minted a credential whose answer was never seen, so that it cannot be revoked here.",
        "Nobody holds it, and it ends by its own life at the issuer; check the issuer and the way to it.",
    ),
}

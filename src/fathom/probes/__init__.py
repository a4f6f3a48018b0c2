"""Measurements of any trained model: one file and one line here each."""

from fathom.probes import (
    domains,
    facts,
    length,
    modalities,
    mtp,
    position,
    reach,
    retrieval,
    routing,
    score,
    selection,
    speed,
)
from fathom.probes.base import Context, Probe

PROBES: dict[str, Probe] = {
    "domains": Probe("held-out loss of each domain", domains.run),
    "position": Probe("loss by place in the context", position.run),
    "speed": Probe("decode speed and cache bytes; MLA expanded and absorbed", speed.run),
    "length": Probe("time of an attention layer against length", length.run),
    "routing": Probe("who uses which expert, against shuffled labels", routing.run),
    "reach": Probe("how far a token can be found by its distance alone", reach.run),
    "score": Probe("share of the score's variance that comes from position", score.run),
    "facts": Probe("bits stored of invented people (fathom data facts), and where", facts.run),
    "modalities": Probe("whose loss rises when a domain's parts are taken away", modalities.run),
    "mtp": Probe("drafts accepted, and the speed of decoding with them", mtp.run),
    "selection": Probe("what a sparse attention selects, against the true one", selection.run),
    "retrieval": Probe("key-value recall and repetition in the context", retrieval.run),
}

__all__ = ["PROBES", "Context", "Probe"]

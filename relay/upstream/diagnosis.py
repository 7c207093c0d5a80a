"""What a failure on the way to an upstream most likely means, in plain words, and what to change.

One diagnosis for each failure: the first row of `upstream.symptoms` that fits, in words about this upstream. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from relay.config.upstreams import PORTS, Upstream
from relay.mail.outcome import Meaning
from relay.upstream.case import Case
from relay.upstream.look import Certificate
from relay.upstream.symptoms import SYMPTOMS, masked


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`cause` is a word for scripts; `what` and `fix` are sentences. `help`: what the provider has to say about it."""

    cause: str
    what: str
    fix: str
    help: str = ""


_NAMES: Final = 5  # of a certificate
_HINTS: Final = {465: "`port: 465` with `security: tls`", 587: "`port: 587` with `security: starttls`", 25: "`port: 25`"}


def diagnose(case: Case, *, name: str, provider_help: Mapping[Meaning, str]) -> Diagnosis:
    """The diagnosis of a failure at the upstream called `name`."""
    row = next(row for row in SYMPTOMS if row.fits(case))
    words = _words(case) | {"name": name}
    return Diagnosis(row.cause, row.what.format_map(words), row.fix.format_map(words), provider_help.get(case.meaning, ""))


def _words(case: Case) -> dict[str, str]:
    """Everything that a row may name."""
    upstream, certificate = case.upstream, case.look.certificate
    offered = next((value for key, value in case.extensions.items() if key.startswith("auth")), "").upper()
    where = f"{case.host}:{upstream.port}"
    return {
        "host": case.host, "port": str(upstream.port), "where": where, "address": case.address or case.host,
        "text": case.reply.text.rstrip(".").removeprefix(f"{where}: ").removeprefix(f"TLS with {where} failed: "),
        "reply": str(case.reply).rstrip("."),
        "here": case.here or "this machine", "source": upstream.source_address or "", "ehlo": upstream.ehlo or "`hostname`",
        "username": upstream.username or "this machine", "secret": _source(upstream),
        "ports": " and ".join(map(str, case.look.ports)), "hint": _hint(case.look.ports),
        "until": f" on {certificate.until:%Y-%m-%d}" if certificate is not None else "",
        "since": f": it begins on {certificate.since:%Y-%m-%d %H:%M} UTC" if certificate is not None else "",
        "names": _names(certificate) if certificate is not None else "other names",
        "issuer": certificate.issuer or "nobody" if certificate is not None else "an authority",
        "tls": case.look.tls, "flag": " -starttls smtp" if upstream.security == "starttls" else "",
        "masked": masked(case), "patience": f"{upstream.timeouts.connect:g} s", "offered": offered or "nothing", "phase": case.phase.name,
        "unless": ", and not `auth: none`" if upstream.auth == "none" else "",
    }  # fmt: skip


def _names(certificate: Certificate) -> str:
    """For whom it is; those of shared hosts have hundreds."""
    more = len(certificate.names) - _NAMES
    return ", ".join(certificate.names[:_NAMES]) + (f" and {more} more" if more > 0 else "") or "no name"


def _source(upstream: Upstream) -> str:
    """Where the password comes from."""
    if upstream.password is None:
        return "`oauth2`"
    return "the configuration itself" if upstream.password.is_plain else upstream.password.source


def _hint(ports: tuple[int, ...]) -> str:
    """What to write for the best port that answers: the one for TLS from the beginning, or the usual one."""
    best = next((port for port in (PORTS["tls"], PORTS["starttls"], *ports) if port in ports), 0)
    return _HINTS.get(best, f"`port: {best}`")

"""`relay test`: try an upstream step by step, and say what is wrong in plain words. Success is recorded as *verified*.

Connects, negotiates TLS, logs in and, with --to, sends a test mail: by itself, whether a relay runs or not. Exit code 1: mail cannot go
by this upstream; 75: it can, and that could not be recorded for a route that asks for it.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_CONFIG, EX_FAILED, EX_TEMPFAIL, EX_USAGE, fail

if TYPE_CHECKING:
    from relay.config.model import Config
    from relay.config.upstreams import Upstream
    from relay.upstream.diagnose import FailedStep, Findings, Step
    from relay.upstream.transaction import Outgoing

_CLEAR = "\r\x1b[K"


def add_parser(subparsers: Any) -> None:
    """Add `test` to the commands."""
    parser = subparsers.add_parser("test", help="try an upstream, and say what is wrong", description=__doc__.partition("\n\n")[2])
    parser.add_argument("upstream", metavar="UPSTREAM", help="its name in the configuration")
    parser.add_argument("--to", metavar="ADDRESS", help="send a test mail to this address")
    parser.add_argument("--from", dest="sender", metavar="ADDRESS", help="its sender; default: one that the upstream may send for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Try it, and return the exit code."""
    from relay.config.findings import ConfigError, Suggestions
    from relay.config.load import find_config, load

    try:
        config = load(find_config(options.config, os.environ))
    except ConfigError as error:
        return fail("\n".join(map(str, error.findings)), EX_CONFIG)
    if options.upstream not in config.upstreams:
        meant = Suggestions().meant(options.upstream, config.upstreams)
        return fail(f"relay test: no such upstream: {options.upstream}{meant}", EX_USAGE)
    if options.sender is not None and options.to is None:
        return fail("relay test: --from needs --to: without a mail there is no sender", EX_USAGE)
    try:
        message = _message(config, options)
    except ValueError as error:
        return fail(f"relay test: {error}", EX_USAGE)
    return _try(config, options, message)


def _try(config: "Config", options: argparse.Namespace, message: "Outgoing | None") -> int:
    import asyncio

    from relay.config.encryption import keys_at
    from relay.upstream.diagnose import examine
    from relay.upstream.token_store import TokenStore

    name, screen = options.upstream, _Screen(quiet=options.json)
    upstream = config.upstreams[name]
    screen.begin(name, upstream)
    store = TokenStore(config.spool.directory, keys_at(config.secrets.key_file, os.environ), note=lambda what: None)
    ehlo = upstream.ehlo or config.hostname
    report = asyncio.run(examine(name, upstream, ehlo=ehlo, told=screen.told, message=message, store=store))
    screen.end()
    unrecorded = _record(config, name) if report.ok else ""
    needed = any(route.verified_only and route.upstream == name for route in config.routes)
    if options.json:
        print(_as_json(name, report, unrecorded))
    else:
        print("\n".join(_conclusion(name, upstream, report, sent_to=options.to, unrecorded=unrecorded)))
    if not report.ok:
        return EX_FAILED
    return fail(f"relay test: {unrecorded}", EX_TEMPFAIL) if unrecorded and needed else 0


def _record(config: "Config", name: str) -> str:
    """Remember the success; answers why it could not be, or nothing."""
    from relay.clock import SystemClock
    from relay.delivery.verified import Marks

    try:
        Marks(config.spool.directory).record(name, config.upstreams[name], now=SystemClock().now())
    except OSError as error:
        return f"the success is not recorded, and the upstream not verified: {error}"
    return ""


# -- the test mail ----------------------------------------------------------------------------------------------------------


def _message(config: "Config", options: argparse.Namespace) -> "Outgoing | None":
    """The test mail, once it is known that the upstream may send it. Raises ValueError."""
    if options.to is None:
        return None
    from datetime import UTC, datetime
    from email.header import Header
    from email.utils import format_datetime, make_msgid

    from relay.mail.envelope import Recipient
    from relay.mail.header import scan
    from relay.mail.permission import objection
    from relay.upstream.transaction import Outgoing

    upstream = config.upstreams[options.upstream]
    recipient = _address(options.to, config)
    sender = _address(options.sender, config) if options.sender is not None else _default_sender(upstream, config)
    subject = Header(f"relay test of upstream {options.upstream}").encode(linesep="\r\n")
    block = (
        f"From: <{sender}>\r\nTo: <{recipient}>\r\nSubject: {subject}\r\n"
        f"Date: {format_datetime(datetime.now(UTC))}\r\nMessage-ID: {make_msgid(domain=config.hostname)}\r\n"
        "Auto-Submitted: auto-generated\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
    ).encode()
    if (reason := objection(upstream.senders, sender, scan(block))) is not None:
        raise ValueError(f"{options.upstream} may not send it: {reason} ({', '.join(upstream.senders)})")
    octets = block + f"`relay test {options.upstream}` on {config.hostname} has sent this. Nothing needs to be done.\r\n".encode()
    ascii_only = sender.isascii() and recipient.isascii()
    return Outgoing(
        sender=sender, recipients=(Recipient(recipient),), octets=octets, size=len(octets),
        eight_bit=not octets.isascii(), smtputf8=not ascii_only, utf8_header=not ascii_only,
    )  # fmt: skip


def _address(text: str, config: "Config") -> str:
    """An address of the command line as the listener would take it. Raises ValueError."""
    from relay.mail.address import AddressError, parse_path
    from relay.routing import complete

    try:
        address, rest = parse_path(text)
    except AddressError as error:
        raise ValueError(f"{text!r} is not an address: {error}") from None
    address = complete(address, config.domain)
    if rest or "@" not in address:
        raise ValueError(f"{text!r} is not an address such as user@example.com")
    return address


def _default_sender(upstream: "Upstream", config: "Config") -> str:
    """The login where it is an address that the upstream may send for; else the first address or domain that it may."""
    from relay.mail.permission import may_send

    login = upstream.username or ""
    if "@" in login and (not upstream.senders or may_send(upstream.senders, login)):
        return login
    first = next(iter(upstream.senders), config.domain or config.hostname)
    return first if "@" in first else f"postmaster@{first}"


# -- what is printed --------------------------------------------------------------------------------------------------------


class _Screen:
    """Says what comes of each step as it comes: lines for a person, nothing for a script."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._shown = ""

    def begin(self, name: str, upstream: "Upstream") -> None:
        if self._quiet:
            return
        login = f"login as {upstream.username}" if upstream.logs_in else "no login"
        provider = f" ({upstream.provider})" if upstream.provider is not None else ""
        print(f"{name}{provider}: {', '.join(upstream.host)}, port {upstream.port}, security {upstream.security}, {login}")
        self._wait()

    def told(self, host: str, address: str, step: "Step | FailedStep") -> None:
        from relay.upstream.diagnose import Step

        if self._quiet:
            return
        self.end()
        heading = f"{host} ({address})" if address and address != host else host
        if heading != self._shown:
            self._shown = heading
            print(heading)
        if isinstance(step, Step):
            print(f"  {step.name:<9}{_milliseconds(step.seconds)}  {step.found}".rstrip())
        else:
            print(f"  {step.phase.value:<9}{_milliseconds(step.seconds)}  failed: {step.reply}")
        sys.stdout.flush()
        self._wait()

    def end(self) -> None:
        """Take away what is not to stay."""
        if self._live:
            print(_CLEAR, end="", file=sys.stderr, flush=True)

    def _wait(self) -> None:
        if self._live:
            print("  …", end="", file=sys.stderr, flush=True)


def _milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1000:>7.0f} ms" if seconds is not None else " " * 10


def _conclusion(
    name: str, upstream: "Upstream", report: "Findings", *, sent_to: str | None, unrecorded: str
) -> list[str]:  # fmt: skip
    lines = [f"note: {remark}" for remark in (*report.remarks, unrecorded) if remark]
    if report.ok:
        what = f"the test mail to {sent_to} was taken" if sent_to else "the login works" if upstream.logs_in else "it takes connections"
        return [*lines, f"ok: {what}{'' if unrecorded else f'; {name} is verified'}"]
    trouble = report.trouble
    if trouble is None:
        return [*lines, "failed"]
    diagnosis = trouble.diagnosis
    lines += [f"failed at {trouble.phase.value}: {diagnosis.what}", f"what to do: {diagnosis.fix}"]
    return [*lines, f"{upstream.provider} says: {diagnosis.help}"] if diagnosis.help else lines


def _as_json(name: str, report: "Findings", unrecorded: str) -> str:
    import json

    answer: dict[str, Any] = {
        "upstream": name,
        "ok": report.ok,
        "verified": report.ok and not unrecorded,
        "trials": [
            {
                "host": trial.host,
                "address": trial.address,
                "complete": trial.complete,
                "steps": [
                    {"step": step.name, "seconds": None if step.seconds is None else round(step.seconds, 6), **step.facts}
                    for step in trial.steps
                ],
                "trouble": _trouble(trial.trouble) if trial.trouble is not None else None,
            }
            for trial in report.trials
        ],
        "remarks": list(report.remarks),
        "trouble": _trouble(report.trouble) if report.trouble is not None else None,
    }
    return json.dumps(answer, indent=2, ensure_ascii=False)


def _trouble(trouble: "FailedStep") -> dict[str, Any]:
    diagnosis = trouble.diagnosis
    return {
        "phase": trouble.phase.value,
        "seconds": round(trouble.seconds, 6),
        "reply": str(trouble.reply),
        "cause": diagnosis.cause,
        "what": diagnosis.what,
        "fix": diagnosis.fix,
        "help": diagnosis.help,
    }

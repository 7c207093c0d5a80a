"""`relay oauth login`: sign in once for an upstream, and leave its refresh token, encrypted, where the relay finds it, running or not.

By a code that is typed in on any device (RFC 8628), or by a browser that comes back to this machine (RFC 8252). Of the file it reads
what concerns this upstream: the operator's shell need not have the secrets of the others. Exit code 1: there was no sign-in.
"""

import argparse
import os
import secrets
from typing import TYPE_CHECKING, Any

from relay.cli.options import EX_CONFIG, EX_FAILED, EX_TEMPFAIL, EX_USAGE, add_config, fail

if TYPE_CHECKING:
    from relay.config.model import Config
    from relay.config.oauth import OAuth2, TokenServer
    from relay.config.upstreams import Upstream


def add_parser(subparsers: Any) -> None:
    """Add `oauth` to the commands."""
    parser = subparsers.add_parser("oauth", help="sign in at Google, Microsoft or another", description="Sign in for an upstream.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    login = verbs.add_parser("login", help="sign in and store the refresh token", description=__doc__.partition("\n\n")[2])
    login.add_argument("upstream", metavar="UPSTREAM", help="its name in the configuration")
    way = login.add_mutually_exclusive_group()
    way.add_argument("--browser", action="store_true", help="sign in with the browser of this machine")
    way.add_argument(
        "--no-browser", action="store_true", help="start none: print a code to type in on any device, or an address to open there"
    )
    login.add_argument("--port", type=_port, default=0, help="where the browser comes back to; default: any that is free")
    add_config(login)
    login.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Sign in, and return the exit code."""
    from relay.config.findings import ConfigError
    from relay.config.load import find_config
    from relay.config.oauth import token_server

    try:
        path = find_config(options.config, os.environ)
        config = _config(path, options.upstream)
    except ConfigError as error:
        return fail(str(error), EX_CONFIG)
    except LookupError as error:
        return fail(f"relay oauth login: {error.args[0]}", EX_USAGE)
    upstream = config.upstreams[options.upstream]
    oauth2 = upstream.oauth2
    if oauth2 is None:
        return fail(f"relay oauth login: upstream {options.upstream} has no `oauth2`, so there is nothing to sign in for", EX_USAGE)
    if oauth2.grant != "refresh_token":
        what = "is signed in for by its key" if oauth2.grant == "service_account" else "asks for tokens as the client itself"
        return fail(f"relay oauth login: upstream {options.upstream} {what}: nobody needs to sign in", EX_USAGE)
    return _sign_in(config, options, upstream, oauth2, token_server(oauth2, upstream.provider))


def _config(path: Any, name: str) -> "Config":
    """The upstream, and where its token is kept. Raises ConfigError and LookupError."""
    from relay.config import oauth
    from relay.config.findings import ConfigError, Finding, Suggestions, dotted
    from relay.config.load import partly

    leave_out = {"password"}

    def narrowed(tree: dict[str, Any]) -> None:
        upstreams = tree.get("upstreams")
        upstreams = upstreams if isinstance(upstreams, dict) else {}
        if name not in upstreams:
            raise LookupError(f"no such upstream: {name}{Suggestions().meant(name, upstreams)}")
        found = upstreams[name]
        if isinstance(found, dict):
            if problems := [problem for problem in oauth.problems(("upstreams", name), found) if problem.severity == "error"]:
                raise ConfigError(Finding(str(path), 0, 0, dotted(each.path), each.message) for each in problems)
            found = {key: value for key, value in found.items() if key not in leave_out}
            if isinstance(found.get("oauth2"), dict):
                found["oauth2"] = {key: value for key, value in found["oauth2"].items() if key not in leave_out}
        tree["upstreams"] = {name: found}

    sections = ("spool", "secrets", "upstreams")
    try:
        return partly(path, os.environ, sections, narrowed=narrowed)
    except ConfigError:
        leave_out.add("refresh_token")  # which may well be what is missing
        return partly(path, os.environ, sections, narrowed=narrowed)


def _sign_in(
    config: "Config", options: argparse.Namespace, upstream: "Upstream", oauth2: "OAuth2", server: "TokenServer"
) -> int:  # fmt: skip
    from relay.cli import oauth_device, oauth_redirect
    from relay.config.encryption import keys_at
    from relay.upstream.oauth2 import client_of
    from relay.upstream.token_error import TokenError
    from relay.upstream.token_store import Chain, StoreError, TokenStore

    device = server.device_url is not None and not options.browser
    if not device and server.authorize_url is None:
        wanted = "authorize_url" if options.browser else "device_url or authorize_url"
        return fail(f"relay oauth login: it is not known where to sign in: add {wanted} to `oauth2`", EX_CONFIG)
    store = TokenStore(config.spool.directory, keys_at(config.secrets.key_file, os.environ), note=print)
    name = options.upstream
    try:
        with store.slot(name) as slot:  # who signs in for nothing is annoyed: see first that it can be stored
            slot.prepare()
        print(f"Sign in as {upstream.username}, or as somebody who may send mail as {upstream.username}.")
        if device:
            answer = oauth_device.sign_in(oauth2, server)
        else:
            answer = oauth_redirect.sign_in(oauth2, server, port=options.port, start=not options.no_browser)
        token = _refresh_token(answer, server)
        with store.slot(name) as slot:
            configured = oauth2.refresh_token.reveal() if oauth2.refresh_token else ""
            slot.save(Chain(token, configured, client_of(oauth2, server), signed=secrets.token_hex(8)))
    except (StoreError, OSError) as error:
        return fail(f"relay oauth login: the refresh token cannot be stored: {error}", EX_TEMPFAIL)
    except TokenError as error:
        from relay.mail.outcome import Failure

        return fail(f"relay oauth login: {error}", EX_FAILED if error.failure is Failure.REFUSED else EX_TEMPFAIL)
    print(f"Signed in. The refresh token is stored, encrypted, in {store.path(name)}.")
    print(f"A relay that runs goes on with it within a quarter of a minute. To try it: relay test {name}")
    return 0


def _refresh_token(answer: dict[str, Any], server: "TokenServer") -> str:
    """What is to be stored. Raises TokenError."""
    from relay.mail.outcome import Failure
    from relay.upstream.token_error import TokenError

    granted = answer.get("scope")
    if server.provider == "google" and isinstance(granted, str) and not set(server.scope.split()) <= set(granted.split()):
        raise TokenError(Failure.REFUSED, "the permission for mail was not given: sign in again, and tick it")
    token = answer.get("refresh_token")
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        more = "; does `scope` have offline_access?" if server.provider != "google" else ""
        raise TokenError(Failure.REFUSED, f"signed in, but no refresh token was given{more}")
    return token


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)

"""`relay-sendmail`, in the place of /usr/sbin/sendmail: takes a message from standard input, and hands it to the relay.

Reads no configuration: it tries `$RELAY_SMTP`, the Unix socket /run/relay/smtp.sock, and 127.0.0.1:2525; while none of them answers, the
message is left in the drop folder, where the relay finds it. It is started for every mail that a script sends, so it loads next to
nothing: no other room of the relay, no `re`, `typing`, `argparse` or `dataclasses`.

Laws: exit code 0 means that the relay has the message on disk, or the drop folder has it. An unexpected error is 75, try again.
"""

import os
import sys
from collections.abc import Sequence

from relay.sendmail import drop
from relay.sendmail.addresses import AddressError, parse_list, parse_one
from relay.sendmail.message import Header, Letter, TooLarge, author_field, lines_of, read
from relay.sendmail.options import USAGE, Options, UsageError, parse
from relay.sendmail.submit import Refused, Unreachable, connect, endpoints, submit

# sysexits.h
EX_OK, EX_USAGE, EX_DATAERR, EX_OSERR, EX_TEMPFAIL = 0, 64, 65, 71, 75
_INTERRUPTED = 130

_MAILNAME = "/etc/mailname"  # Debian Policy section 11.6: the domain of mail that programs of this machine write


def main(arguments: Sequence[str] | None = None, *, name: str = "") -> int:
    """Do what sendmail's command line asks for; the answer is the exit code. `name`: how it was called."""
    _keep_standard_streams()
    if arguments is None:
        name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
    try:
        options = parse(name, arguments)
        for warning in options.warnings:
            _complain(name, warning)
        return _run(name, options)
    except UsageError as error:
        return _complain(name, str(error), EX_USAGE)
    except (AddressError, TooLarge) as error:
        return _complain(name, str(error), EX_DATAERR)
    except Refused as error:
        return _complain(name, str(error), error.code)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        return _complain(name, f"{type(error).__name__}: {error}", EX_TEMPFAIL)


def _keep_standard_streams() -> None:
    """A caller may have closed some: the next file or socket that is opened would then be standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _complain(name: str, text: str, code: int = EX_OK) -> int:
    _show(f"{name}: {text}", descriptor=2)
    return code


def _run(name: str, options: Options) -> int:
    if options.mode == "deliver":
        return _deliver(name, options)
    if options.mode == "smtp":
        return _pipe(name)
    if options.mode == "queue":
        _show("The queue is the relay's: `relay queue list` shows it, to root and to the relay's own user.")
    elif options.mode == "help":
        _show(USAGE.format(name=name))
    return EX_OK


def _deliver(name: str, options: Options) -> int:
    letter = _letter(options)
    said: list[str] = []
    for endpoint in endpoints(os.environ, said):
        try:
            answer = submit(endpoint, letter, _show if options.verbose else lambda _: None)
        except Unreachable as error:
            said.append(str(error))
        else:
            return _done(options, answer)
    folder = drop.folder(os.environ)
    try:
        dropped = drop.write(folder, letter)
    except OSError as error:
        said.append(f"{folder}: {error.strerror or error}")
        return _complain(name, f"the relay cannot be reached ({'; '.join(said)}); nothing was sent, try again", EX_TEMPFAIL)
    return _done(options, f"no relay answers ({'; '.join(said)}); the message waits for it as {os.path.join(folder, dropped)}")


def _done(options: Options, answer: str) -> int:
    if options.verbose:
        _show(answer)
    return EX_OK


def _show(text: str, *, descriptor: int = 1) -> None:
    """For a person. Whether it can be shown changes nothing about the mail."""
    try:
        os.write(descriptor, f"{text}\n".encode("utf-8", "replace"))
    except OSError:
        return


def _letter(options: Options) -> Letter:
    """The message on standard input, and for whom. Raises UsageError or AddressError."""
    recipients = [address for text in options.recipients for address in parse_list(_text(text))]
    if not recipients and not options.from_header:
        raise UsageError("no recipient is given, neither here nor with -t")
    sender = parse_one(_text(options.sender if options.sender is not None else _login()))
    try:
        octets = read(0, dot_ends=options.dot_ends)
    except OSError as error:
        raise AddressError(f"the message cannot be read: {error.strerror}") from None
    header = Header(lines_of(octets, dot_ends=options.dot_ends))
    if options.from_header:
        recipients += header.recipients()
    if not recipients:
        raise UsageError("no recipient is given, neither here nor in the header")
    author = b"" if header.has(b"from") else author_field(sender or "MAILER-DAEMON", _full_name(options))
    content = header.content(author=author, domain=_domain())
    return Letter(sender, list(dict.fromkeys(recipients)), content, notify=options.notify, ret=options.ret, envid=options.envid)


def _text(argument: str) -> str:
    """An argument as UTF-8, whatever the locale says."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def _login() -> str:
    """Who has called us: a bare name, which the relay completes. From the environment, it may be anything. Raises Refused."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        if name := os.environ.get("LOGNAME") or os.environ.get("USER"):
            return name
        raise Refused(f"user {os.getuid()} has no name; say -f SENDER", code=EX_OSERR) from None


def _domain() -> str:
    """What completes a From: the envelope is completed by the relay, which knows better, but does not touch the content."""
    if name := os.environ.get("RELAY_DOMAIN", ""):
        return name if _is_name(name) else ""
    try:
        with open(_MAILNAME, encoding="ascii", errors="replace") as file:
            name = file.readline(256).strip()
    except OSError:
        name = ""
    name = name or os.uname().nodename
    return name if "." in name and _is_name(name) else ""


def _is_name(text: str) -> bool:
    return text.replace("-", "").replace(".", "").isalnum()


def _full_name(options: Options) -> str:
    if (name := options.full_name if options.full_name is not None else os.environ.get("NAME")) is not None:
        return _text(name)
    import pwd

    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        return ""
    return entry.pw_gecos.partition(",")[0].replace("&", entry.pw_name.capitalize())


def _pipe(name: str) -> int:
    from relay.sendmail.pipe import exchange

    said: list[str] = []
    for endpoint in endpoints(os.environ, said):
        try:
            connection = connect(endpoint)
        except Unreachable as error:
            said.append(str(error))
        else:
            with connection:
                exchange(connection)
            return EX_OK
    os.write(1, b"421 4.3.2 No relay answers, try again later\r\n")
    return _complain(name, f"the relay cannot be reached ({'; '.join(said)})", EX_TEMPFAIL)

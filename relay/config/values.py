"""Read the small languages inside one value of the file: networks, hosts, addresses, conditions, header names.

Every function takes what the file says and returns what the program uses, or raises ValueError with words for the person who
wrote it. Numbers that stood in the file without quotes come as `Whole` or `Decimal`, which remember how they were written: so
`1.2` can be text, and a bare `30` can be refused as a duration. Pure.
"""

import json
import os
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from relay.mail.address import AddressError, folded, is_mailbox, normalize_domain, parse_path
from relay.mail.header import is_field_name

Network = IPv4Network | IPv6Network

_UID = re.compile(r"uid:(0|[1-9][0-9]{0,9})")
_MODE = re.compile(r"0?[0-7]{3}")
_UNIX, _SYSTEMD = "unix:", "systemd:"
_FD_NAME = re.compile(r"[!-9;-~]{1,255}")  # sd_listen_fds_with_names(3): printable ASCII without colons
_BIND = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+)):(\d{1,5})")
_NAMED_ADDRESS = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^<>"]*?))\s*<([^<>]*)>\s*')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BETWEEN = re.compile(r"[,;\s]+(?=[^,;\s/])")
_SEVERAL: Final = "several are a list: [a, b]"
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_RESERVED_HEADERS: Final = {"received", "return-path", "bcc"}
#: unix(7): 108 bytes with the null byte that ends it.
SOCKET_PATH_LIMIT: Final = 107


class Whole(int):
    """A whole number that stood in the file without quotes."""

    written: str


class Decimal(float):
    """A number with a fraction that stood in the file without quotes."""

    written: str


@dataclass(frozen=True, slots=True)
class Uid:
    """A user of this machine, as a Unix socket tells."""

    number: int

    def __str__(self) -> str:
        return f"uid:{self.number}"


def as_written(value: Any) -> Any:
    """An unquoted number as the text it was; anything else as it is."""
    return value.written if isinstance(value, Whole | Decimal) else value


def parse_text(value: str) -> str:
    """Text for one line: no control characters, which would break a log line, a command or a header."""
    if _CONTROL.search(value):
        raise ValueError("must not contain control characters or line breaks")
    return value


def parse_service_account(value: str) -> str:
    """The JSON key of a service account, as Google's console hands it out."""
    try:
        key = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is not the JSON key file of a service account") from None
    if not isinstance(key, dict) or not all(isinstance(key.get(name), str) for name in ("client_email", "private_key")):
        raise ValueError("is no key of a service account: it has no client_email and private_key")
    if "PRIVATE KEY-----" not in key["private_key"]:
        raise ValueError("is no key of a service account: its private_key is not a PEM key")
    return value


def parse_name(value: str) -> str:
    """A name for a listener, an upstream or a route, as commands and log lines repeat it."""
    if not value.strip():
        raise ValueError("must not be empty")
    if len(value) > 200:
        raise ValueError("must have at most 200 characters")
    return parse_text(value)


def parse_upstream_name(value: str) -> str:
    """An upstream's name is also a word on the command line."""
    if re.search(r"\s", value):
        raise ValueError("an upstream's name must not contain blanks")
    return parse_name(value)


def parse_network(value: Any) -> Network:
    """An address or a network in CIDR form. IPv4 networks in IPv6 clothes become IPv4 networks."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    value = as_written(value)
    if not isinstance(value, str):
        raise ValueError("must be a network such as 10.0.0.0/8, or an address")
    if value.startswith("uid:"):
        raise ValueError("a user of this machine comes over a Unix socket, which has no networks")
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        one = _SEVERAL if _BETWEEN.search(value) else "write 10.1.2.0/24 or 10.1.2.3"
        raise ValueError(f"not a network or an address: {value!r}; {one}") from None
    if "/" in value and ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f"{value} names an address inside the network, did you mean {network}?")
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        v4 = network.network_address.ipv4_mapped
        return IPv4Network(f"{v4}/{network.prefixlen - 96}")
    return network


def parse_source(value: Any) -> Network | Uid:
    """Where a client may come from: a network, an address, or `uid:1000` for a user of this machine, over a Unix socket."""
    value = as_written(value)
    if isinstance(value, Uid):
        return value
    if not isinstance(value, str) or not value.startswith("uid:"):
        return parse_network(value)
    match = _UID.fullmatch(value)
    if not match or int(match[1]) >= 2**32 - 1:
        raise ValueError(f"{value!r}: a user is a number, as in uid:1000")
    return Uid(int(match[1]))


def parse_client_network(value: Any) -> Network:
    """A network whose hosts may connect without a password: never so wide that strangers are in it."""
    return narrow(parse_network(value))


def parse_trusted_source(value: Any) -> Network | Uid:
    """Where those connect who are believed."""
    source = parse_source(value)
    return source if isinstance(source, Uid) else narrow(source)


def client_of(text: str) -> IPv4Address | IPv6Address | Uid | None:
    """A client as `is_from` looks at it, an IPv4 one out of its IPv6 clothes; None for what is neither an address nor a user."""
    if match := _UID.fullmatch(text):
        return Uid(int(match[1]))
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def is_from(client: IPv4Address | IPv6Address | Uid | None, sources: tuple[Network | Uid, ...]) -> bool:
    """Whether a client comes from one of these."""
    if client is None or isinstance(client, Uid):
        return client in sources
    return any(client in source for source in sources if not isinstance(source, Uid))


def narrow(network: Network) -> Network:
    """The network again, once it holds no strangers."""
    widest = 8 if network.version == 4 else 16
    if network.prefixlen < widest:
        raise ValueError(f"{network} is wider than /{widest}: that would be an open relay")
    return network


def parse_bind(value: str) -> str:
    """Check `host:port`, `[v6]:port`, `unix:/path` or `systemd:NAME`, and return it as it is."""
    if value.startswith(_UNIX):
        path = value.removeprefix(_UNIX)
        if not path.startswith("/") or path.endswith("/"):
            raise ValueError("the path of a Unix socket begins with /, as in unix:/run/relay/smtp.sock")
        if (length := len(os.fsencode(path))) > SOCKET_PATH_LIMIT:
            raise ValueError(f"the path has {length} bytes, a socket's path at most {SOCKET_PATH_LIMIT}")
        return value
    if value.startswith(_SYSTEMD):
        if not _FD_NAME.fullmatch(value.removeprefix(_SYSTEMD)):
            raise ValueError("must be systemd: and the name that the socket unit gives, its FileDescriptorName=")
        return value
    match = _BIND.fullmatch(value)
    if not match:
        hint = "; an IPv6 address stands in brackets" if value.count(":") > 1 else ""
        raise ValueError(f"must be host:port, such as 127.0.0.1:2525 or [::1]:2525, unix:/path or systemd:NAME{hint}")
    if int(match[3]) > 65535:
        raise ValueError("the port must be at most 65535")
    if match[1] is not None:
        parse_ip(match[1])
    else:
        parse_host(match[2])
    return value


def split_bind(bind: str) -> tuple[str, int]:
    """Host, without brackets, and port of a checked bind; `""` and 0 for a socket that has none."""
    if bind.startswith((_UNIX, _SYSTEMD)):
        return "", 0
    host, _, port = bind.rpartition(":")
    return host.strip("[]"), int(port)


def socket_path(bind: str) -> str:
    """The path of a Unix socket; `""` for any other checked bind."""
    return bind.removeprefix(_UNIX) if bind.startswith(_UNIX) else ""


def inherited_name(bind: str) -> str:
    """The name under which systemd hands a socket over; `""` for any other checked bind."""
    return bind.removeprefix(_SYSTEMD) if bind.startswith(_SYSTEMD) else ""


def parse_socket_mode(value: Any) -> int:
    """The permissions of a Unix socket: `"0660"`. Numbers from code, not from a file, already are what they say."""
    if isinstance(value, int) and not isinstance(value, bool | Whole):
        return value
    if not isinstance(value, str) or not _MODE.fullmatch(value):
        raise ValueError('must be octal digits in quotes, such as "0660"')
    return int(value, 8)


def parse_ip(value: str) -> str:
    """An IPv4 or IPv6 address."""
    try:
        ip_address(value)
    except ValueError:
        raise ValueError(f"not an IP address: {value!r}") from None
    return value


def parse_host(value: str) -> str:
    """A host name or an IP address; names from other scripts become A-labels."""
    if "://" in value:
        raise ValueError("write the host alone; `security` and `port` say the rest")
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if ":" in bare or re.fullmatch(r"[0-9.]+", bare):
        try:
            return parse_ip(bare)
        except ValueError:
            if re.fullmatch(r"[^:]+:\d+", bare):
                raise ValueError("write the host alone and the port as `port`") from None
            raise
    try:
        return normalize_domain(bare.removesuffix("."))
    except ValueError:
        raise ValueError(f"not a host name: {value!r}" + (f"; {_SEVERAL}" if _BETWEEN.search(value) else "")) from None


def parse_ehlo(value: str) -> str:
    """A domain, or an address literal such as [192.0.2.1] (RFC 5321 section 4.1.1.1)."""
    if value.startswith("[") and value.endswith("]"):
        parse_ip(value[1:-1].removeprefix("IPv6:"))
        return value
    return parse_domain(value)


def parse_domain(value: str) -> str:
    """A domain as lower-case A-labels."""
    if client_of(value) is not None:
        raise ValueError(f"an IP address is no domain: {value!r}")
    try:
        return normalize_domain(value.removesuffix("."))
    except ValueError:
        raise ValueError(f"not a domain: {value!r}") from None


def parse_address(value: str) -> str:
    """One address with a domain, which becomes lower-case A-labels; the local part stays as it is."""
    if "<" in value:
        raise ValueError(f"must be an address alone, such as user@example.com, not {value!r}")
    if not is_mailbox(value):
        try:
            parse_path(f"<{value}>")
        except AddressError as error:
            raise ValueError(f"not an address: {value!r}: {error}") from None
        raise ValueError(f"not an address: {value!r}; write user@example.com")
    local, _, domain = parse_path(f"<{value}>")[0].rpartition("@")
    return f"{local}@{domain.lower() if domain.startswith('[') else normalize_domain(domain)}"


def parse_alias(value: str) -> str:
    """What an alias stands for: an address, or a local part alone. As it compares: in lower case."""
    if "@" in value:
        return folded(parse_address(value))
    try:
        address, rest = parse_path(f"<{value}>")
    except AddressError as error:
        raise ValueError(f"not an address: {value!r}: {error}") from None
    if not address or rest:
        raise ValueError("must be an address, or the part before the @")
    return folded(address)


def parse_condition(value: str) -> str:
    """`example.com`, `*.example.com`, `user@example.com`, `<>` or `*`, as it compares: in lower case, domains as A-labels."""
    if value in ("*", "<>"):
        return value
    if value.startswith("@"):
        raise ValueError(f"for every address of the domain, write {value[1:]!r} without the @")
    if "@" in value:
        if "*" in value:
            raise ValueError(f"{value!r}: for every address of a domain, write the domain alone")
        return folded(parse_address(value))
    stem = value.removeprefix("*.")
    if hint := _no_domain(stem):
        raise ValueError(f"{value!r}: {hint}")
    if "*" in stem:
        raise ValueError(f'{value!r}: `*` may only stand alone or as the first label, as in "*.example.com"')
    try:
        return value[: len(value) - len(stem)] + normalize_domain(stem)
    except ValueError:
        raise ValueError(
            f'{value!r} is neither a domain nor an address; write example.com, "*.example.com", user@example.com, "<>" or "*"'
        ) from None


def _no_domain(text: str) -> str:
    """What to write instead of something that is often taken for a domain; `""` where that cannot be told."""
    if _BETWEEN.search(text):
        return _SEVERAL
    if text.endswith("."):
        return "write the domain without the dot at its end"
    if text.startswith("."):
        return f'for all below it, write "*{text}"'
    return "an IP address and no domain; for where mail comes from there is `client`" if client_of(text) is not None else ""


def parse_permission(value: str) -> str:
    """What an upstream's `senders` may hold: a domain or an address. A credential's bounds are named one by one."""
    if value == "*":
        raise ValueError("leave `senders` out when the upstream may send for everyone")
    if value == "<>":
        raise ValueError("the null sender needs no permission; name domains and addresses")
    if value.startswith("*."):
        raise ValueError(f"{value!r}: patterns are not possible here; name each domain, such as {value[2:]}")
    return parse_condition(value)


def parse_user_permission(value: str) -> str:
    """What a user's `senders` may hold: as for an upstream, and `*` for anybody, which nobody gets without saying so."""
    return value if value == "*" else parse_permission(value)


def parse_recipient_condition(value: str) -> str:
    """A condition on a recipient, which is never null."""
    if value == "<>":
        raise ValueError("a recipient is never null")
    return parse_condition(value)


def parse_named_address(value: str) -> dict[str, str]:
    """Name and address out of `Name <address>`, `"Name" <address>` or `address`; the name is left out where there is none."""
    match = _NAMED_ADDRESS.fullmatch(value)
    if not match:
        if "<" in value or ">" in value or "@" not in value:
            raise ValueError('must be "Name <user@example.com>", user@example.com, {name: …} or {address: …}')
        return {"address": value.strip()}
    name = re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2]
    return {"name": name, "address": match[3]} if name else {"address": match[3]}


def parse_header_name(value: str) -> str:
    """The name of a header field (RFC 5322 section 2.2)."""
    if value.endswith(":"):
        raise ValueError("write the name without the colon")
    if not is_field_name(value):
        raise ValueError(f"not the name of a header field: {value!r}")
    return value


def parse_removable_header_name(value: str) -> str:
    """The name of a field that a route takes away: it may be written as a pattern elsewhere, and would fit no field here."""
    if "*" in value:
        raise ValueError(f"{value!r}: patterns are not possible here; name each field")
    return parse_header_name(value)


def parse_settable_header_name(value: str) -> str:
    """The name of a field that a route may set; some would undo custody or reveal recipients."""
    if parse_header_name(value).lower() in _RESERVED_HEADERS:
        raise ValueError(f"{value} may not be set here" + ("; use `bcc`" if value.lower() == "bcc" else ""))
    return value


def unique_header_names(fields: dict[str, str]) -> dict[str, str]:
    """`fields` again, once no name is there in two spellings."""
    seen: set[str] = set()
    for name in fields:
        if name.lower() in seen:
            raise ValueError(f"{name} is there twice: the names of header fields ignore case")
        seen.add(name.lower())
    return fields

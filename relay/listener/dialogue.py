"""One SMTP dialogue: what each command means after the ones before it, and the reply to it (RFC 5321 section 4).

Knows commands and replies, not connections or octets. State: who the client says it is, the transaction, and whether content is
expected.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from relay.intake import Transaction
from relay.mail import dsn
from relay.mail.address import AddressError, ParameterError, parse_parameters, parse_path
from relay.mail.envelope import Origin, Recipient
from relay.mail.reply import Reply

if TYPE_CHECKING:
    from relay.listener.door import Door

_OK = Reply(250, "2.0.0", "Ok")
_SENDER_OK = Reply(250, "2.1.0", "Ok")
_RECIPIENT_OK = Reply(250, "2.1.5", "Ok")
_GO_AHEAD = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
_BYE = Reply(221, "2.0.0", "Bye")
_FAULT = Reply(451, "4.3.0", "Local error, try again later")
_UNKNOWN = Reply(500, "5.5.2", "Unknown command")
_SYNTAX = Reply(501, "5.5.4", "Syntax error in the arguments")
_NEED_MAIL = Reply(503, "5.5.1", "MAIL first")
_NEED_RCPT = Reply(503, "5.5.1", "RCPT first")
_NESTED_MAIL = Reply(503, "5.5.1", "A transaction is already open")
_NEED_HELLO = Reply(503, "5.5.1", "EHLO or HELO first")
_UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Unknown parameter")
_TOO_LARGE = Reply(552, "5.3.4", "Message too large")
_VRFY = Reply(252, "2.5.0", "Cannot verify, but will take mail")
_HELP = Reply(214, "2.0.0", "EHLO HELO MAIL RCPT DATA RSET NOOP VRFY QUIT")


_Verb = Callable[["Dialogue", str], Reply]


class Dialogue:
    """The commands of one session. `receiving`: DATA was answered with 354 and the content has not come."""

    verbs: ClassVar[dict[bytes, _Verb]]

    def __init__(self, door: "Door", origin: Origin) -> None:
        self._door = door
        self._origin = origin
        self._client_name = ""
        self._extended = False
        self._transaction: Transaction | None = None
        self.receiving = False

    def answer(self, line: bytes) -> Reply:
        """Do one command, given without its LF. A fault of ours is 451."""
        word, _, argument = line.rstrip(b"\r").partition(b" ")
        verb = self.verbs.get(word.upper())
        if verb is None:
            return _UNKNOWN
        try:
            return verb(self, argument.decode("utf-8", "surrogateescape"))
        except Exception as error:  # law 9: temporary to the client, loud in the log
            self._door.journal.fault(f"{word.decode('ascii', 'replace')[:10]} from a client", error, session=self._origin.session)
            return _FAULT

    def take_transaction(self) -> Transaction:
        """The transaction whose content has come; the next one may begin."""
        transaction, self._transaction = self._transaction, None
        assert transaction is not None, "DATA is answered with 354 only inside a transaction"
        return transaction

    def refuse(self, reply: Reply, sender: str = "", recipients: str = "") -> Reply:
        """Note a refusal in the journal and hand it on."""
        origin = self._origin
        self._door.journal.refused(
            session=origin.session, listener=origin.listener, client=origin.client, sender=sender, recipients=recipients, reply=str(reply)
        )
        return reply

    def _ehlo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._greet(argument, extended=True)
        return self._door.extensions

    def _helo(self, argument: str) -> Reply:
        if not argument.strip():
            return _SYNTAX
        self._greet(argument, extended=False)
        return Reply(250, "", self._door.hostname.decode())

    def _greet(self, name: str, *, extended: bool) -> None:
        self._client_name, self._extended, self._transaction = name.strip()[:255], extended, None

    def _mail(self, argument: str) -> Reply:
        if not self._client_name:
            return _NEED_HELLO
        if self._transaction is not None:
            return _NESTED_MAIL
        try:
            sender, text = _path_after("FROM:", argument)
            parameters = parse_parameters(text) if text else {}
            ret, envid = dsn.message_wishes(parameters)
        except AddressError as error:
            return Reply(501, "5.1.7", f"Bad sender address: {error}")
        except (_KeywordMissing, ParameterError):
            return _SYNTAX
        if (reply := self._check_parameters(parameters)) is not None:
            return self.refuse(reply, sender or "<>") if reply is _TOO_LARGE else reply
        if "SIZE" in parameters and (obstacle := self._door.intake.obstacle(int(parameters["SIZE"]))) is not None:
            return self.refuse(obstacle, sender or "<>")
        smtputf8 = "SMTPUTF8" in parameters
        if not smtputf8 and not sender.isascii():
            return Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8")
        protocol = "UTF8SMTP" if smtputf8 else "ESMTP" if self._extended else "SMTP"
        opened = self._door.intake.begin(self._origin, self._client_name, protocol, sender, smtputf8=smtputf8, ret=ret, envid=envid)
        if isinstance(opened, Reply):
            return self.refuse(opened, sender or "<>")
        self._transaction = opened
        return _SENDER_OK

    def _check_parameters(self, parameters: dict[str, str]) -> Reply | None:
        for keyword, value in parameters.items():
            if keyword == "SIZE":  # RFC 1870
                if not (value.isascii() and value.isdigit() and len(value) <= 20):
                    return _SYNTAX
                if int(value) > self._door.settings.message_size:
                    return _TOO_LARGE
            elif keyword == "BODY":  # RFC 6152
                if value.upper() not in ("7BIT", "8BITMIME"):
                    return _SYNTAX
            elif keyword == "SMTPUTF8":  # RFC 6531
                if value:
                    return _SYNTAX
            elif keyword not in ("RET", "ENVID"):  # RFC 3461, read already
                return _UNKNOWN_PARAMETER
        return None

    def _rcpt(self, argument: str) -> Reply:
        transaction = self._transaction
        if transaction is None:
            return _NEED_MAIL
        try:
            address, text = _path_after("TO:", argument)
            notify = orcpt = ""
            if text:
                parameters = parse_parameters(text)
                if parameters.keys() - {"NOTIFY", "ORCPT"}:
                    return _UNKNOWN_PARAMETER
                notify, orcpt = dsn.recipient_wishes(parameters, smtputf8=transaction.smtputf8)
        except AddressError as error:
            return Reply(501, "5.1.3", f"Bad recipient address: {error}")
        except (_KeywordMissing, ParameterError):
            return _SYNTAX
        if not address:
            return Reply(501, "5.1.3", "Bad recipient address: it is empty")
        if not transaction.smtputf8 and not address.isascii():
            return Reply(550, "5.6.7", "A non-ASCII address needs SMTPUTF8")
        reply = self._door.intake.add(transaction, Recipient(address, notify, orcpt), limit=self._door.settings.recipients)
        return _RECIPIENT_OK if reply is None else self.refuse(reply, transaction.sender or "<>", address)

    def _data(self, argument: str) -> Reply:
        transaction = self._transaction
        if argument.strip():
            return _SYNTAX
        if transaction is None:
            return _NEED_MAIL
        if not transaction.recipients:
            return _NEED_RCPT
        if (obstacle := self._door.intake.obstacle()) is not None:
            return self.refuse(obstacle, transaction.sender or "<>", ",".join(transaction.recipients))
        self.receiving = True
        return _GO_AHEAD

    def _rset(self, argument: str) -> Reply:
        self._transaction = None
        return _OK

    def _noop(self, argument: str) -> Reply:
        return _OK

    def _vrfy(self, argument: str) -> Reply:
        return _VRFY if argument.strip() else _SYNTAX

    def _help(self, argument: str) -> Reply:
        return _HELP

    def _quit(self, argument: str) -> Reply:
        return _SYNTAX if argument.strip() else _BYE


Dialogue.verbs = {
    b"EHLO": Dialogue._ehlo,
    b"HELO": Dialogue._helo,
    b"MAIL": Dialogue._mail,
    b"RCPT": Dialogue._rcpt,
    b"DATA": Dialogue._data,
    b"RSET": Dialogue._rset,
    b"NOOP": Dialogue._noop,
    b"VRFY": Dialogue._vrfy,
    b"HELP": Dialogue._help,
    b"QUIT": Dialogue._quit,
}


class _KeywordMissing(ValueError):
    """MAIL without FROM:, RCPT without TO:."""


def _path_after(keyword: str, argument: str) -> tuple[str, str]:
    """The address and the parameters of MAIL or RCPT. Raises _KeywordMissing or AddressError."""
    argument = argument.lstrip(" \t")
    if argument[: len(keyword)].upper() != keyword:
        raise _KeywordMissing
    return parse_path(argument[len(keyword) :])

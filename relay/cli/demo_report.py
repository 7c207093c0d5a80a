"""What the demo shows: one block for each message, from the relay's own events and from what arrived at the provider.

The relay's events say which route took it and what went wrong on the way; the provider says who logged in, over which TLS, and what
the message looked like. Both know the message by the id in its trace field.

State: what is known of messages that have not arrived yet.
"""

import email.parser
import email.policy
import re
import sys
from typing import Any

from relay.cli.demo_scene import Letter
from relay.cli.demo_upstream import Arrival

_TRACE_ID = re.compile(rb"^Received:.*?\bid ([0-9A-F]+)", re.DOTALL)
_SHOWN_EVENTS = {"failed", "held", "bounced", "throttled", "auth-failed", "recovered", "fault"}
_HIDDEN_FIELDS = {"time", "level", "event", "session", "listener", "traceback"}
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

Event = dict[str, Any]


class Ink:
    """Colours, on a terminal that wants them."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._coloured else text


class Report:
    """Prints messages as they arrive, and judges the demo's own."""

    def __init__(self, ports: dict[str, int], ink: Ink) -> None:
        self._ports = ports
        self._ink = ink
        self._arrivals: dict[str, Arrival] = {}
        self._accepted: dict[str, Event] = {}
        self._trouble: dict[str, list[Event]] = {}
        self._letters: dict[str, Letter] = {}
        self._number = 0
        self.verdicts: dict[str, bool] = {}

    def expect(self, message_id: str, letter: Letter) -> None:
        """The message with this id is one of the demo's own."""
        self._letters[message_id] = letter

    def arrived(self, arrival: Arrival) -> None:
        """A provider has taken a message; the block is printed when the relay says so too."""
        found = _TRACE_ID.match(arrival.content)
        if found:
            self._arrivals[found[1].decode()] = arrival

    def note(self, event: Event) -> str:
        """Take one event of the relay. Answers the id of the message whose block was printed, or `""`."""
        name, message_id = event["event"], str(event.get("id", ""))
        if name == "accepted":
            self._accepted[message_id] = event
        elif name == "deferred":
            self._trouble.setdefault(message_id, []).append(event)
            if not str(event.get("next", "")).startswith("fallback"):
                self._say("deferred", "yellow", f"{event['sender']} → {event['recipients']}: {event['reply']}; again {event.get('next')}")
        elif name == "refused":
            who = " → ".join(str(event[key]) for key in ("sender", "recipients") if key in event)
            self._say("refused", "red", f"{who}: {event['reply']}")
        elif name == "sent" and message_id in self._arrivals:
            self._show(message_id, event)
            return message_id
        elif name in _SHOWN_EVENTS:
            fields = (f"{key} {value}" for key, value in event.items() if key not in _HIDDEN_FIELDS)
            self._say(name, "yellow", ", ".join(fields))
        return ""

    def line(self, text: str = "") -> None:
        print(text)
        sys.stdout.flush()

    def _say(self, label: str, style: str, text: str) -> None:
        self.line(f"{self._ink(style, f'{label:<12}')}{text}\n")

    def _show(self, message_id: str, sent: Event) -> None:
        arrival, accepted = self._arrivals.pop(message_id), self._accepted.pop(message_id, sent)
        letter = self._letters.get(message_id)
        header = email.parser.BytesHeaderParser(policy=email.policy.default).parsebytes(arrival.content)
        final_from = str(header.get("From", ""))
        if letter is not None:
            self.verdicts[message_id] = letter.arrived_well(arrival, final_from)
        self._number += 1
        who = f"{accepted['sender']} → {sent['recipients']}"
        subject = f"  {header.get('Subject', '')}"
        self.line(f"{self._number:<4}{self._ink('bold', who)}{self._ink('dim', subject)}")
        self._row("route", str(sent["route"]))
        for event in self._trouble.pop(message_id, []):
            if str(event.get("next", "")).startswith("fallback"):
                text = f"{event['upstream']} is down ({event['reply']}): its fallback {arrival.upstream} takes over"
                self._row("degraded", text, style="yellow")
        security = "TLS from the start" if arrival.upstream == "globex" else "STARTTLS"
        where = f"127.0.0.1:{self._ports[arrival.upstream]}, {security}, {arrival.tls}, certificate verified"
        self._row("upstream", f"{self._ink('bold', arrival.upstream)} ({where})")
        self._row("credential", f"{arrival.login}, password accepted")
        was = f"{letter.author}  →  " if letter is not None and letter.author != final_from else ""
        self._row("From", f"{was}{self._ink('cyan', final_from)}")
        if header.get("Reply-To"):
            self._row("Reply-To", str(header["Reply-To"]))
        self._row("sent", f"{float(sent['delay']) * 1000:.0f} ms after it came in: {sent['reply']}", style="green")
        self.line()

    def _row(self, label: str, text: str, *, style: str = "dim") -> None:
        self.line(f"    {self._ink(style, f'{label:<12}')}{text}")

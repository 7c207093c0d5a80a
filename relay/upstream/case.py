"""One failure on the way to an upstream with all that was seen of it, and what a line of the table of symptoms asks of it. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure, Meaning, Phase
from relay.mail.reply import Reply
from relay.upstream.look import NOTHING_SEEN, Look


class Case(NamedTuple):
    """One failure. `reply`: code 0 where none came. `here`: our address on the way there. `extensions`: as offered last."""

    upstream: Upstream
    host: str
    address: str
    phase: Phase
    reply: Reply
    failure: Failure | None = None
    meaning: Meaning = Meaning.OTHER
    here: str = ""
    connected: bool = False
    extensions: Mapping[str, str] = {}
    look: Look = NOTHING_SEEN


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. What is left empty fits always; `says`: any of these in the reply, in lower case."""

    cause: str
    what: str
    fix: str
    phases: tuple[Phase, ...] = ()
    failures: tuple[Failure, ...] = ()
    meanings: tuple[Meaning, ...] = ()
    says: tuple[str, ...] = ()
    when: Callable[[Case], bool] | None = None

    def fits(self, case: Case) -> bool:
        return (
            (not self.phases or case.phase in self.phases)
            and (not self.failures or case.failure in self.failures)
            and (not self.meanings or case.meaning in self.meanings)
            and (not self.says or any(phrase in case.reply.text.lower() for phrase in self.says))
            and (self.when is None or self.when(case))
        )

"""Where a reasoning trace stops understanding its query, and the key sentence that follows. Pure, by rules.

SafeKey (arXiv:2505.16186) parts a trace into the understanding U, in which the model restates and takes in the query,
the key sentence K, which is the first sentence after it, and the rest. These rules are ours. They read how a sentence
opens and how many of its words are the query's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

METHOD = "rules/1"
"""Name and version of the rules, for records; it changes with their results."""
LONGEST = 12
"""Sentences of an understanding at most; more is not taken for one."""
OPEN, CLOSE = "<think>", "</think>"

Span = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True)
class Spans:
    """Where U and K stand in a whole response, tags included, and how sure that is, 0 < ``confidence`` ≤ 1."""

    understanding: Span
    key: Span
    confidence: float


class SegmentationError(ValueError):
    """Why a trace cannot be segmented, without any of its text."""


_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|approx|cf)\.$")
_INITIAL = re.compile(r"\b[A-Z]\.$")
_OPENS = re.compile(r"\s*(?:Hmm|First|I|The|They|Let|So|But|This|That|It|My|Maybe|Okay|Now|We)\b")
"""What begins a sentence after a single capital letter, which is else taken for an initial."""
_END = re.compile(r"[.!?…]+[\"'”’»)\]*]*(?=\s|$)|[。！？]+[”’」』）]*|\n+")
_HESITATION = (
    r"(?:(?:okay|ok|alright|all right|hmm+|well|so|now|then|and|but|also|next|additionally|wait)\b[,.…:]*\s*)*"
)
_REQUESTER = (
    r"(?:the (?:user|person|question|query|request|prompt|problem|task|statement|goal|message)|"
    r"they|he|she|this user|someone|both)"
)
_DESCRIBES = re.compile(
    rf"^{_HESITATION}{_REQUESTER}(?:['’](?:s|re|ve|d))?\b(?! might| may| could| probably| can)", re.IGNORECASE
)
_TASK = re.compile(
    rf"^{_HESITATION}(?:i(?:['’]m| am)? (?:need|want|have|trying|asked|supposed|being asked|should)\b|let me|we need)",
    re.IGNORECASE,
)
_SETUP = re.compile(
    r"\b(?:respond|response|reply|answer|approach|handle|address|help|understand|read|query|request|question)\b",
    re.IGNORECASE,
)
_TURNS = re.compile(
    r"^(?:hmm+|first|let me|let's|wait|looking|according|since|however|given|as an ai|my |that|this|these|it['’ ]|"
    r"(?:so,? |now,? |but,? |and,? |alright,? |okay,? )?i\b|under |in this case|before)",
    re.IGNORECASE,
)
_JUDGES = re.compile(
    r"\b(?:illegal|unlawful|harmful|problematic|red flags?|concern\w*|polic\w+|unethical|inappropriate|violat\w+|"
    r"sensitive|dangerous|serious|refuse|guidelines?|safety)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{3,}|\d+", re.UNICODE)
_COMMON_WORDS = """
    the and for are was were has have had that this with from they them their user users asking asks ask wants want
    about how what why who which when where you your can could would should will need figure out okay not but its
    also some any into then than there here just like does did been being
    respond response reply answer answering query question request address help best way ways possible
"""
_COMMON = frozenset(_COMMON_WORDS.split())
RESTATES = 0.5
"""Share of a sentence's content words that are the query's, from which it counts as restating it."""


def sentences(text: str) -> list[Span]:
    """The sentences of ``text``, without the white space around them.

    A sentence ends with a full stop, question or exclamation mark, or a line break. Abbreviations, initials, decimals
    and what stands within one pair of double quotation marks do not end one.
    """
    found: list[Span] = []
    start = 0
    for stop in _END.finditer(text):
        piece = text[start : stop.end()]
        broken = stop.group().startswith("\n")
        initial = _INITIAL.search(piece) and not _OPENS.match(text, stop.end())
        if not broken and (initial or _ABBREVIATION.search(piece) or _inside_quotes(piece)):
            continue
        found += _stripped(text, start, stop.end())
        start = stop.end()
    return found + list(_stripped(text, start, len(text)))


def segment(query: str, response: str) -> Spans:
    """U and K of ``response``, a ``<think>`` trace for ``query``.

    The confidence is ours: 0.95 where a sentence restates the query in the usual words and the next one turns away
    from it in the usual words, 0.8 where only one of them is that clear, 0.6 where neither is.

    Raises:
        SegmentationError: there is no think block, no restatement, or nothing after it.
    """
    start, end = thinking(response)
    spans = [(start + a, start + b) for a, b in sentences(response[start:end])]
    if len(spans) < 2:
        raise SegmentationError("its reasoning has fewer than two sentences")
    known = _content(query)
    last, clear = _restatement(response, spans, known)
    if last + 1 == len(spans):
        raise SegmentationError("nothing follows its understanding")
    following = response[slice(*spans[last + 1])]
    turned = bool(_TURNS.match(following)) and not _continues(following, known)
    confidence = (0.6, 0.8, 0.95)[int(clear) + int(turned)]
    return Spans((spans[0][0], spans[last][1]), spans[last + 1], confidence)


def thinking(response: str) -> Span:
    """Where the reasoning of ``response`` stands, between its tags. Raises SegmentationError where there is none."""
    opened = response.find(OPEN)
    if opened < 0 or response[:opened].strip():
        raise SegmentationError(f"it does not begin with {OPEN}")
    start = opened + len(OPEN)
    end = response.find(CLOSE, start)
    if end < 0:
        raise SegmentationError(f"its reasoning is not closed by {CLOSE}")
    return start, end


def _restatement(response: str, spans: list[Span], known: frozenset[str]) -> tuple[int, bool]:
    """The last sentence of the understanding, and whether it opens in the usual words."""
    last, clear = -1, False
    for number, span in enumerate(spans[: LONGEST + 1]):
        sentence = response[slice(*span)]
        if _continues(sentence, known):
            clear |= bool(_DESCRIBES.match(sentence))
        elif last < 0 and _TASK.match(sentence) and _shared(sentence, known) >= RESTATES:
            clear = True
        elif last < 0 and _prepares(sentence):
            continue
        else:
            break
        last = number
    if last < 0:
        raise SegmentationError("no sentence at its beginning restates the query")
    if last >= LONGEST:
        raise SegmentationError(f"its understanding would be longer than {LONGEST} sentences")
    return last, clear


def _continues(sentence: str, known: frozenset[str]) -> bool:
    """Whether it goes on telling what is asked, without judging that in words which are not the query's."""
    if any(not _content(found.group()) <= known for found in _JUDGES.finditer(sentence)):
        return False
    if re.match(r"(?:first|hmm+)\b", sentence, re.IGNORECASE):
        return False
    if _DESCRIBES.match(sentence):
        return True
    return not _TURNS.match(sentence) and not _TASK.match(sentence) and _shared(sentence, known) >= RESTATES


def _prepares(sentence: str) -> bool:
    """Whether it only says that the query is to be taken up: "I need to figure out how to respond to this"."""
    return bool(_TASK.match(sentence) and _SETUP.search(sentence))


def _shared(sentence: str, known: frozenset[str]) -> float:
    words = _content(sentence)
    return len(words & known) / len(words) if words else 0.0


def _content(text: str) -> frozenset[str]:
    """Beginnings of the words that carry meaning, so that forms of one word agree."""
    return frozenset(w[:5] for w in _WORD.findall(text.lower()) if w not in _COMMON)


def _inside_quotes(piece: str) -> bool:
    """Whether a double quotation mark is still open; one that is never closed within the paragraph does not count."""
    return piece.count('"') % 2 == 1 or piece.count("“") > piece.count("”")


def _stripped(text: str, start: int, end: int) -> Iterator[Span]:
    piece = text[start:end]
    if piece.strip():
        yield start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())

"""What the name of a folder says of the images in it: that they are good, or that they are not."""

from __future__ import annotations

import re

__all__ = ["looks_bad", "looks_good"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GOOD = _names(
    """
    good goods ok okay oks normal normals nominal pass passed fine clean healthy intact perfect correct
    accept accepted acceptable conform conforming conformant flawless faultless undamaged negative
    negatives neg golden io inordnung gut gutteil gutteile fehlerfrei fehlerlos einwandfrei
    unbeschädigt nodefauts sansdefaut bon bons conforme conformes buono bueno 正常 合格 合格品 良品
    """
)
_BAD = _names(
    """
    ng nok ko bad nogood notgood notok nio nichtinordnung defect defects defective defectives
    anomaly anomalies anomalous abnormal fault faults faulty reject rejects rejected fail fails failed
    scrap nonconforming nonconform schlecht ausschuss fehlerhaft mauvais defaut defauts 不良 不良品 异常
    """
)
_WITHOUT_DEFECT = re.compile(
    r"(no|non|not|without|zero|un)(a|any)?(defect|anomal|fault|flaw|damage|error)\w*"
    r"|(defect|anomaly|fault|flaw|damage|error)s?(free|less)"
)
_NEUTRAL = re.compile(
    r"(image|img|picture|photo|sample|part|piece|product|item|class|label|surface|teil|bild)(e?s?|er)"
    "|all|new|old|data|set|the|train|test|only"
)


def looks_good(name: str) -> bool:
    """Whether images in a folder of this name are without defects, as most would call it.

    Told by whole words: ``OK``, ``ok_images``, ``0_normal`` and ``no-defect``, but not ``fine_scratch``
    nor ``not_ok``.
    """
    words = _words(name)
    joined = "".join(words)
    return joined in _GOOD or words[:1] == ["good"] or bool(_WITHOUT_DEFECT.fullmatch(joined))


def looks_bad(name: str) -> bool:
    """Whether images in a folder of this name show defects of any kind, as most would call it.

    Told by whole words: ``NG``, ``bad_parts``, ``n.i.O.``, but not ``scratch`` nor ``no_defect``.
    """
    return "".join(_words(name)) in _BAD


def _words(name: str) -> list[str]:
    """The words that say something."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    found = re.findall(r"[^\W\d_]+", spaced.lower())
    return [word for word in found if not _NEUTRAL.fullmatch(word)]

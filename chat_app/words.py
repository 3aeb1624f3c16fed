"""Words: what the page says of a study, its findings and an answer. No web framework."""

from __future__ import annotations

from typing import Any

from .session import Session


def numbered(session: Session) -> list[tuple[str, str]]:
    """Choices of the findings' list."""
    return [(f"{i.number} · {i.place} · {i.volume_ml:.2f} ml · {i.state}", str(i.number)) for i in session.review.items.values()]


def suggestions(session: Session) -> list[str]:
    """Three questions that fit the study."""
    if session.upload is None:
        return ["", "", ""]
    if session.shown is None:
        return ["Reconstruct this and describe it.", "Reconstruct this.", "What sequence and plane is this?"]
    if session.review.items:
        return ["How large is the largest lesion?", "Where are the lesions?", "Write a report."]
    return ["What sequence and plane is this?", "Outline the left hippocampus.", "Is there a lesion?"]


def last_question(chat: list[dict[str, Any]]) -> str:
    """The last question."""
    asked = [m["content"] for m in chat if m["role"] == "user"]
    last = asked[-1] if asked else ""
    return last if isinstance(last, str) else str(last[0].get("text", ""))


def answer_markdown(answer: Any, *, linked: bool = True) -> str:
    """An answer for the chat: text, findings as links that the viewer follows, and what to be warned of.

    Args:
        linked: The findings lie on the series that the viewer shows.
    """
    lines = [answer.text]
    if answer.findings:
        dicom = any(f.sop_instance_uid for f in answer.findings)
        lines += ["", f"| finding | location | ml | mm | slice |{' SOPInstanceUID |' * dicom}", f"|---|---|---|---|---|{'---|' * dicom}"]
        for f in answer.findings:
            told, number = f.to_json(), f.lesion.rank
            numbers = f"{told['volume_ml']:.2f} | {told['diameter_mm']:.0f} | {told['slice_index'] + 1}"
            name = f"[finding {number}](#finding-{number})" if linked else f"finding {number}"
            lines.append(f"| {name} | {told['location']} | {numbers} |{f' {f.sop_instance_uid} |' * dicom}")
    elif shown := [s for s in answer.structures if s.voxels]:
        lines += ["", "| structure | ml |", "|---|---|", *(f"| {s.name} | {s.volume_ml:.1f} |" for s in shown)]
    lines += ["", *(f"⚠ {w}" for w in answer.warnings)]
    return "\n".join(lines).strip() + f"\n\n*{answer.notice}*"

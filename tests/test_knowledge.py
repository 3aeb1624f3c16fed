"""What is asked of MRI in general: given word for word, and never in place of a word on this study."""

from __future__ import annotations

from omnimri import Assistant, assistant, open_study
from omnimri.knowledge import GENERAL, KNOWLEDGE, as_known, asked_in_general


def test_what_is_known_in_general_is_said_word_for_word(checkpoint, scan_file, monkeypatch):
    """A sentence on lesions needs pixels, unless it is one of those that speak of no study."""
    told = KNOWLEDGE[0][2]
    assert "lesions" in told
    made = Assistant(checkpoint)
    planes = [answer for _, _, answer in KNOWLEDGE if "axial" in answer or "coronal" in answer or "sagittal" in answer]
    assert len(planes) == 3  # whatever the plane of this study is
    for said, text in ((told, told), (told.replace("is suppressed", "is bright"), told), *zip(planes, planes, strict=True)):
        monkeypatch.setattr(assistant, "generate", lambda *_, said=said: made.tokenizer(said, add_special_tokens=False)["input_ids"])
        assert made.answer(open_study(scan_file), "What is a FLAIR sequence?").text == text
    assert as_known("The slices are axial.") == "The slices are axial."
    assert len(GENERAL) == len(KNOWLEDGE)
    monkeypatch.setattr(assistant, "generate", lambda *_: made.tokenizer("No, it is T2-weighted.", add_special_tokens=False)["input_ids"])
    assert made.answer(open_study(scan_file), "Why is FLAIR used?").text == told


def test_a_question_in_general_is_none_of_this_study():
    known = {name: answer for name, _, answer in KNOWLEDGE}
    for question, name in {
        "Could you explain how fluid-attenuated inversion recovery works?": "a FLAIR sequence",
        "what do the letters DWI stand for": "diffusion-weighted imaging",
        "What is T2* used for?": "a T2*-weighted image",
        "For my exam: what is DWI used for?": "diffusion-weighted imaging",
        "Explain T2 weighting.": "a T2-weighted image",
        "Define T1-weighted.": "a T1-weighted image",
    }.items():
        assert asked_in_general(question) == known[name], question
    for question in (
        "Explain the FLAIR findings.",
        "Why is this FLAIR dark?",
        "Is this a FLAIR?",
        "Explain the difference between T1 and T2.",
        "What does the hyperintensity on FLAIR mean?",
        "Explain what you see.",
        "How large is the lesion on T1?",
    ):
        assert not asked_in_general(question), question

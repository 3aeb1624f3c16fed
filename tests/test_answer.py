"""No finding without pixels, no number from the language model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from omnimri.anatomy import NAMES, SEQUENCES
from omnimri.answer import fill_slots, lesion_measures
from omnimri.assistant import Assistant
from omnimri.conversation import Message, plain_ids
from omnimri.factcheck import (
    BRAIN_ALONE,
    NOT_SHOWN,
    ground_anatomy,
    ground_contrast,
    ground_findings,
    ground_lesions,
    ground_limits,
    ground_looks,
    ground_place,
    ground_plane,
    ground_sequence,
    ground_structures,
    ground_words,
    structures_asked,
)
from omnimri.lesions import Lesion, without_sides
from omnimri.measure import Measured, brain_box, lobe_of
from omnimri.tasks import Segment
from omnimri.tokens import digit_ids
from omnimri.volume import Study


def lesion(rank, side, place, ml=2.0, mm=18.0):
    return Lesion(rank, side, place, Measured(ml, mm, ((0, 0, 0), (1, 1, 1)), 41, (0, 0, 0)), 0.9, 0.5)


LEFT = lesion(1, "left", "left cerebral white matter", 5.25, 31)
RIGHT = lesion(2, "right", "right putamen", 0.4, 8)
REPORT = ("Axial FLAIR MRI of the brain. There is a <size> lesion in the left cerebral white matter <segment>, <mm> mm in diameter "
          "and <ml> ml in volume. Impression: a single lesion in the left cerebral white matter.")


@pytest.mark.parametrize(
    ("question", "raw", "plane", "said", "changed"),
    [("What sequence and plane is this?", "This is a T1-weighted MRI.", "axial", "This is a T1-weighted MRI. The plane is axial.", False),
     ("Which plane?", "The plane is coronal.", "sagittal", "The plane is sagittal.", True),
     ("Write a report.", "Axial FLAIR MRI of the brain.", "oblique", "Oblique FLAIR MRI of the brain.", True),
     ("Which?", "This is an axial MRI.", "sagittal", "This is a sagittal MRI.", True),
     ("Write a report.", "<report> FLAIR MRI.", "axial", "<report> FLAIR MRI.", False),
     ("Write a report.", "<report> Axial <size> lesion.", "axial", "<report> Axial MRI of the brain. A <size> lesion.", False)],
)
def test_the_plane_is_the_affines(question, raw, plane, said, changed):
    text, notes = ground_plane(question, raw, plane)
    assert text == said
    assert bool(notes) == changed


def test_a_lesion_without_a_mask_is_removed_and_said():
    found = ground_lesions(REPORT, (), exhaustive=True)
    assert "lesion in" not in found.raw
    assert found.raw.endswith("Impression: no lesion was found.")
    assert any("without a mask" in n for n in found.notes)


def test_a_mask_is_never_denied():
    denial = "Axial T1-weighted MRI of the brain. No lesion is found. Impression: no focal lesion."
    found = ground_lesions(denial, (LEFT, RIGHT), exhaustive=True)
    assert "No lesion" not in found.raw
    assert "no focal" not in found.raw
    assert found.raw.count("<segment>") == 2
    assert found.lesions == (LEFT, RIGHT)


def test_a_checkpoint_that_finds_too_few_may_not_deny():
    for text in ("Axial FLAIR MRI of the brain. No lesion is found. Impression: no focal lesion.", "There is no focal lesion."):
        found = ground_lesions(text, (), exhaustive=True, can_deny=False)
        assert "no focal" not in found.raw.lower()
        assert "cannot be told" in found.raw
    assert ground_lesions("No lesion is found.", (), exhaustive=False, can_deny=False).raw.startswith("Whether")


def test_wrong_side_or_count_is_corrected():
    wrong = REPORT.replace("left", "right")
    found = ground_lesions(wrong, (LEFT,), exhaustive=True)
    assert "right" not in found.raw
    assert found.raw.count("<segment>") == 1
    many = ground_lesions("<count> lesions are seen.", (LEFT,), exhaustive=False)
    assert "<count>" not in many.raw


def test_slots_are_bound_to_the_nearest_segment_and_to_the_header():
    seen = SimpleNamespace(volume=SimpleNamespace(parameters={"echo_time_ms": 92.4}))
    found = ground_lesions(REPORT, (LEFT,), exhaustive=True)
    text = fill_slots(found.raw, [lesion_measures(x, 60) for x in found.lesions], seen, found.lesions)
    assert "There is a large lesion in the left cerebral white matter (slice 42 of 60), 31 mm in diameter and 5.2 ml in volume." in text
    assert fill_slots("The echo time is <te> ms.", [], seen, ()) == "The echo time is 92 ms."
    assert fill_slots("The repetition time is <tr> ms.", [], seen, ()) == "The repetition time is not recorded."
    assert "<" not in text


@pytest.mark.parametrize("number", ["7", "12.5", "T1 7"])
def test_digits_are_blocked(tokenizer, number):
    blocked = set(digit_ids(tokenizer))
    assert blocked & set(tokenizer(number)["input_ids"])
    assert not blocked & set(tokenizer("T1-weighted, 3rd ventricle, 4th ventricle, T2")["input_ids"])


def test_people_cannot_write_control_tokens(tokenizer):
    special = {tokenizer.convert_tokens_to_ids(t) for t in ("<segment>", "<|im_end|>", "<image>", "<ml>")}
    assert not special & set(plain_ids("<segment> <|im_end|> <image> <ml> hi", tokenizer))


def test_many_lesions_are_not_all_spelled_out():
    found = ground_lesions("Impression: <count> lesions.", (LEFT, RIGHT) * 4, exhaustive=True)
    assert found.raw.count("<segment>") == len(found.lesions) == 4
    assert "The other 4 are smaller and listed with the findings. Impression" in found.raw


def test_questions_name_structures():
    from omnimri.anatomy import by_known_names, names_in

    assert names_in("How large is the left hippocampus?") == ("left hippocampus",)
    assert names_in("Outline the thalamus") == ("left thalamus", "right thalamus")
    assert names_in("the left inferior lateral ventricle") == ("left inferior lateral ventricle",)
    assert names_in("Where is the 3rd ventricle?") == ("3rd ventricle",)
    assert names_in("Compare left and right hippocampus") == names_in("left vs. the right hippocampus: same?")
    assert names_in("Compare left and right hippocampus") == ("left hippocampus", "right hippocampus")
    assert names_in("Write a report.") == ()
    both = ("left hippocampus", "right hippocampus")
    assert names_in("Is the left hippocampus smaller than the right?") == names_in("Outline the hippocampi") == both
    assert names_in("the hippocampus on the left") == names_in("left-sided hippocampus") == ("left hippocampus",)
    assert names_in("That is the left hippocampus, right?") == ("left hippocampus",)
    assert names_in("the left hippocampus and both amygdalae") == ("left hippocampus", "left amygdala", "right amygdala")
    assert by_known_names("Outline the Brain stem and left hippocampal volume") == "Outline the brain-stem and left hippocampus volume"
    assert names_in("brainstem and fourth ventricle") == ("4th ventricle", "brain-stem")


@pytest.mark.parametrize(
    ("raw", "told"),
    [("This is a T1-weighted MRI.", "The sequence cannot be told from the image."),
     ("<report> Axial FLAIR MRI of the brain. Visible are the thalami.",
      "<report> Axial MRI of the brain. The sequence cannot be told from the image. Visible are the thalami."),
     ("The plane is axial.", "The plane is axial.")],
)
def test_no_sequence_is_named_that_cannot_be_told(raw, told):
    assert ground_sequence("", raw, "other", "axial")[0] == told


LISTED = "The slices show the cerebral hemispheres, thalami and brain-stem."
SIGNAL = {"cerebrospinal fluid": "much darker", "grey matter": "darker"}
MEASURED = "Cerebrospinal fluid is much darker than white matter and grey matter is darker than white matter."


@pytest.mark.parametrize(
    ("raw", "visible", "signal", "said"),
    [(LISTED, ("left cerebral white matter", "left thalamus", "brain-stem"), {}, LISTED),
     (LISTED, ("left cerebral white matter", "brain-stem"), {}, "The slices show the cerebral hemispheres and brain-stem."),
     (f"FLAIR MRI. {LISTED}", (), {}, "FLAIR MRI."),
     (MEASURED, (), SIGNAL, MEASURED),
     ("Cerebrospinal fluid is brighter than white matter.", (), SIGNAL, MEASURED),
     ("Grey matter is similar to white matter.", (), {}, ""),
     ("No, the brain-stem is not visible.", (), {}, "No, the brain-stem is not visible."),
     ("No, the thalami are not visible.", ("left thalamus",), {}, "Yes, the thalami are visible."),
     ("Yes, the brain-stem is visible.", (), {}, "No, the brain-stem is not visible."),
     ("Grey matter is darker than white matter.", (), SIGNAL, "Grey matter is darker than white matter.")],
)
def test_normal_anatomy_is_told_as_the_masks_show_it(raw, visible, signal, said):
    text, notes = ground_anatomy(raw, visible, signal)
    assert text == said
    assert bool(notes) == (said != raw)


def test_what_has_a_mask_is_not_said_to_be_out_of_sight():
    """Whatever the model says, in each of its wordings; and no other structure than the one asked for."""
    outlined = "Outlined: the 4th ventricle <segment>, <ml> ml."
    for said in ("The 4th ventricle is not visible in these slices.", "These slices do not show the 4th ventricle.",
                 "I cannot see the 4th ventricle here."):
        assert ground_structures((), said, {"4th ventricle"})[0] == outlined
        assert ground_structures(("4th ventricle",), said, {"brain-stem"}) == (said, ())
        assert ground_structures(("brain-stem",), said, {"4th ventricle"})[0] == "The brain-stem is not visible in these slices."
        assert ground_anatomy(said.replace("4th ventricle", "brain-stem"), (), {}) == (said.replace("4th ventricle", "brain-stem"), ())
    assert ground_structures(("4th ventricle",), "Outlined: the brain-stem <segment>.", {"4th ventricle"})[0] == outlined
    assert ground_structures((), outlined, ()) == (outlined, ())


def test_a_side_alone_means_what_was_spoken_of_before():
    before = "Outlined: the left hippocampus <segment>, <ml> ml."
    assert structures_asked("And the right one?", before) == ("right hippocampus",)
    assert structures_asked("And the left one?", before) == ("left hippocampus",)
    assert structures_asked("And the right thalamus?", before) == ("right thalamus",)
    assert structures_asked("Write a report.", before) == structures_asked("And the right one?", "") == ()


@pytest.mark.parametrize(
    ("question", "raw", "sequence", "said"),
    [("", "<report> Axial T1-weighted MRI of the brain. No lesion.", "T2w", "<report> Axial T2-weighted MRI of the brain. No lesion."),
     ("", "This is a coronal FLAIR image.", "T1w-Gd", "This is a coronal contrast-enhanced T1-weighted image."),
     ("", "This is a FLAIR MRI.", "FLAIR", "This is a FLAIR MRI."),
     ("", "The sequence cannot be told from the image.", "PDw", "This is a proton-density-weighted MRI."),
     ("", "The plane is axial; the sequence cannot be told.", "T2w", "Axial T2-weighted MRI of the brain."),
     ("Is this T2-weighted?", "No, it is T2-weighted.", "T2w", "Yes, it is T2-weighted."),
     ("Is this a T1 image?", "Yes, it is T1-weighted.", "FLAIR", "No, it is FLAIR."),
     ("Is this a T2 FLAIR?", "No, it is FLAIR.", "FLAIR", "Yes, it is FLAIR."),
     ("Is this a T1?", "No, it is T1-weighted.", "T1w-Gd", "Yes, it is contrast-enhanced T1-weighted."),
     ("T1 or T2?", "Yes, it is T1-weighted.", "T2w", "It is T2-weighted."),
     ("Is this a contrast-enhanced T1?", "No, it is T1-weighted.", "T1w", "It is T1-weighted."),
     ("Is this a T1 without contrast?", "Yes, it is T1-weighted.", "T1w-Gd", "It is contrast-enhanced T1-weighted."),
     ("", "Diffusion-weighted images are needed to tell that.", "T1w", "Diffusion-weighted images are needed to tell that."),
     ("", "T2*-weighted images are needed to tell that.", "other", "T2*-weighted images are needed to tell that."),
     ("", "Axial diffusion-weighted MRI of the brain.", "other", "Axial MRI of the brain. The sequence cannot be told from the image.")],
)  # fmt: skip
def test_the_sequence_is_the_known_one(question, raw, sequence, said):
    assert ground_sequence(question, raw, sequence, "axial")[0] == said
    assert ground_sequence(question, said, sequence, "axial")[0] == said


@pytest.mark.parametrize(
    ("sequence", "source", "said"),
    [("T1w-Gd", "header", "A contrast agent was given."), ("T1w", "header", "The header records no contrast agent."),
     ("T1w", "image", "Whether contrast agent was given cannot be told from this study."),
     ("FLAIR", "header", "Whether contrast agent was given cannot be told from this study.")],
)
def test_contrast_agent_is_told_where_it_is_known(sequence, source, said):
    for raw in ("No, no contrast agent was given.", "Yes, a contrast agent was given.", "Yes, no contrast agent was given."):
        assert ground_contrast(raw, sequence, source)[0] == said
    assert ground_contrast("This is a T1-weighted MRI.", sequence, source)[0] == "This is a T1-weighted MRI."


def test_looks_and_diagnoses_need_their_sequence():
    said = ("A <size> irregularly enhancing lesion in the left putamen <segment>. "
            "Impression: a single lesion in the left putamen, perhaps a high-grade glioma.")
    assert ground_looks(said, "T1w-Gd") == (said, ())
    bare = "A <size> lesion in the left putamen <segment>. Impression: a single lesion in the left putamen."
    assert ground_looks(said, "T1w")[0] == bare
    assert ground_looks("A <size> diffusion-restricted lesion lies here.", "T2w")[0] == "A <size> lesion lies here."
    assert ground_looks("Impression: a single lesion in the left putamen, perhaps an acute infarct.", "other")[1] == ()
    assert ground_limits("Is there a stroke?", "No lesion is found.", "T1w").endswith("Diffusion-weighted images are needed to tell that.")
    for question, series in (("Any microbleeds?", "T2*"), ("Restricted diffusion?", "Diffusion"), ("a CVA?", "Diffusion"),
                             ("Does it enhance?", "Contrast-enhanced")):  # fmt: skip
        assert series in ground_limits(question, "No lesion is found.", "T1w")
    assert ground_limits("Does it enhance?", "No lesion is found.", "T1w-Gd") == "No lesion is found."
    assert ground_limits("Find lesions.", "No lesion is found.", "T1w") == "No lesion is found."


def test_every_look_of_the_recipe_is_allowed_on_its_sequence():
    from data_recipes.describe import LOOKS

    for looks in LOOKS.values():
        for sequence, (adjective, may_be) in looks.items():
            said = f"A <size> {adjective} lesion lies in the left putamen <segment>. Impression: a single lesion, perhaps {may_be}."
            assert ground_looks(said, sequence if sequence in SEQUENCES else "other") == (said, ())


@pytest.mark.parametrize(
    ("raw", "task", "lesions", "said"),
    [("Impression: no focal lesion.", "detect", (LEFT,), "Impression: a single lesion in the left cerebral white matter."),
     ("Impression: a single lesion in the left cerebral white matter.", "detect", (LEFT, RIGHT),
      "Impression: <count> lesions, the largest in the left cerebral white matter."),
     ("Impression: <count> lesions, the largest in the right putamen.", "detect", (), "Impression: no lesion was found."),
     ("The largest lesion lies in the right thalamus <segment>: <mm> mm, <ml> ml.", "detect", (LEFT,),
      "The largest lesion lies in the left cerebral white matter <segment>: <mm> mm, <ml> ml."),
     ("The largest lesion lies in the left frontal lobe.", "detect", (), "No lesion is found."),
     ("It lies in the midline.", "detect", (), "No lesion is found."),
     ("The largest lesion is on the right.", "detect", (LEFT,), "The largest lesion is on the left."),
     ("A <size> lesion in the left cerebral white matter <segment>, <mm> mm, <ml> ml.", "detect", (LEFT, RIGHT),
      ("A <size> lesion in the left cerebral white matter <segment>, <mm> mm, <ml> ml. "
       "There is a <size> lesion in the right putamen <segment>, <mm> mm in diameter and <ml> ml in volume."))],
)
def test_what_masks_know_is_said_as_they_know_it(raw, task, lesions, said):
    found = ground_findings("", raw, task, lesions, sequence="T1w", visible=(), signal={}, can_deny=True)
    assert found.raw == said
    assert len(found.lesions) == said.count("<segment>")


@pytest.mark.parametrize(("axis", "count", "cited"), [(2, 60, "1.2.41"), (0, 60, None), (2, 0, None)])
def test_a_finding_cites_the_instance_of_its_largest_slice(axis, count, cited):
    seen = SimpleNamespace(volume=SimpleNamespace(source=tuple(f"1.2.{k}" for k in range(count))), slice_axis=axis)
    assert Assistant._finding(None, LEFT, seen).to_json()["sop_instance_uid"] == cited


def test_a_report_opens_with_its_plane(checkpoint, scan_file):
    """Whatever the model would say first: this one was never trained."""
    from omnimri import open_study

    made, study = Assistant(checkpoint), open_study(scan_file)
    plane = made.examine(study.primary).grid.plane.capitalize()
    for settings in ({}, {"beams": 2}, {"on_text": lambda _: True}):
        assert made.answer(study, "Write a report.", task="report", **settings).raw.startswith(f"<report> {plane}")


def test_a_query_that_is_the_standing_one_draws_no_second_mask(checkpoint, scan_file, monkeypatch):
    from omnimri import assistant, examination, open_study

    made, study, drawn = Assistant(checkpoint), open_study(scan_file), []
    made.examine(study.primary)
    said = made.tokenizer("Outlined: the left thalamus <segment>.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(assistant, "generate", lambda *_: said)
    logits = examination.structure_logits
    monkeypatch.setattr(examination, "structure_logits", lambda *given: drawn.append(given) or logits(*given))
    made.answer(study, "Outline the left thalamus.")
    assert len(drawn) == 1, "an untrained model's own query is another"
    monkeypatch.setattr(examination, "SAME_QUERY", 1e9)
    assert made.answer(study, "Outline the left thalamus.").structures[0].name == "left thalamus"
    assert len(drawn) == 1


def test_a_lobe_is_told_as_the_mask_measures_it():
    box = brain_box(torch.ones(120, 150, 110, dtype=torch.int32), torch.eye(4, dtype=torch.float64))
    assert box is not None
    assert brain_box(torch.ones(120, 150, 60, dtype=torch.int32), torch.eye(4, dtype=torch.float64)) is None  # not whole
    places = ((0.2, 0.8, 0.7, "left frontal lobe"), (0.8, 0.3, 0.7, "right parietal lobe"), (0.85, 0.4, 0.2, "right temporal lobe"),
              (0.4, 0.05, 0.5, "left occipital lobe"), (0.4, 0.52, 0.6, ""))  # fmt: skip
    for *at, lobe in places:
        assert lobe_of(f"{'left' if at[0] < 0.5 else 'right'} cerebral white matter", torch.tensor(at)) == lobe
    assert lobe_of("left thalamus", torch.tensor([0.2, 0.8, 0.7])) == ""
    text = "The largest lesion lies in the left parietal lobe. It is large."
    said, notes = ground_place(text, (replace(LEFT, lobe="left frontal lobe"),))
    assert (said, len(notes)) == ("The largest lesion lies in the left frontal lobe. It is large.", 1)
    assert ground_place(said, (replace(LEFT, lobe="left frontal lobe"),)) == (said, ())
    assert ground_place(text, (LEFT,))[0].startswith(f"The lobe cannot be told; the largest lesion lies in the {LEFT.place}.")
    assert ground_place("The hippocampus is a part of the temporal lobe.", (LEFT,))[1] == ()


def test_a_lesion_on_both_sides_is_said_to_be_on_both():
    both = replace(LEFT, side="midline")
    assert ground_place("The largest lesion is on the right.", (both,))[0] == "The largest lesion lies on both sides of the midline."
    assert ground_place("The largest lesion is on the right.", (LEFT,))[0] == "The largest lesion is on the left."
    assert ground_place("The largest lesion is on the left.", (LEFT,)) == ("The largest lesion is on the left.", ())
    assert ground_place("It lies in the midline.", (replace(LEFT, side="unknown"),))[0] == "The side cannot be told."
    assert lesion_measures(both, 50)["cite"] == "(slice 42 of 50, on both sides of the midline)"
    assert lesion_measures(LEFT, 50)["cite"] == "(slice 42 of 50)"
    raw = (f"A lesion lies in the {LEFT.place} <segment>, <mm> mm. A lesion in the right thalamus <segment>. "
           f"Impression: 2 lesions, the largest in the {LEFT.place}.")
    seen = SimpleNamespace(volume=None)
    lesions = (both, replace(LEFT, place="right thalamus"))
    said = fill_slots(raw, [lesion_measures(x, 50) for x in lesions], seen, lesions)
    bare = LEFT.place.removeprefix("left ")
    assert said.startswith(f"A lesion lies in the {bare} (slice 42 of 50, on both sides of the midline), ")
    assert "in the right thalamus (slice 42 of 50)." in said
    assert said.endswith(f"the largest in the {bare}.")
    alone = fill_slots(f"Impression: a single lesion in the {LEFT.place}.", [], seen, (both,))
    assert alone == f"Impression: a single lesion in the {bare}."
    assert without_sides("right cerebellum cortex, left of the brain-stem") == "cerebellum cortex, left of the brain-stem"
    assert both.told_place == bare
    said = ground_place("The largest lesion lies in the left parietal lobe.", (replace(both, lobe="left frontal lobe"),))[0]
    assert said == "The largest lesion lies in the frontal lobe on both sides."


def test_no_lesion_is_not_said_of_another_organ():
    def said(question):
        return ground_words(question, "", "<detect> No lesion is found.", sequence=("T1w", "image"), plane="axial", visible=())[0]

    assert said("Is the liver healthy?") == said("Is the heart normal on this head scan?") == NOT_SHOWN
    assert said("Is there an aneurysm?") == said("a pituitary lesion?") == said("Any fracture?") == BRAIN_ALONE
    for question in ("Is anything abnormal?", "Any brain metastasis of lung cancer?", "Any metastases of cervical cancer?"):
        assert said(question) == "<detect> No lesion is found."


def test_what_was_asked_of_another_series_is_told(checkpoint, scan):
    made = Assistant(checkpoint)
    one = replace(scan, sequence="T1w", name="series 1")
    told = made.answer(Study(volumes=(one,)), "Are there lesions on the FLAIR?", task="detect").warnings
    assert any("no series is known to be the one that was named: this is said of series 1" in w for w in told)
    assert not any("no series" in w for w in made.answer(Study(volumes=(one,)), "Are there lesions on the T1?", task="detect").warnings)
    other = replace(scan, voxels=scan.voxels[..., :-1], sequence="FLAIR", name="series 2")
    both = Study(volumes=(one, other))
    assert made.answer(both, "Are there lesions on the FLAIR?", task="detect").study["used"] == "series 2"
    before = (Message("user", "Are there lesions on the FLAIR?"), Message("assistant", "<detect> No lesion is found."))
    assert made.answer(both, "Are there lesions?", history=before, task="detect").study["used"] == "series 2"
    assert made.answer(both, "Are there lesions?", task="detect").study["used"] == "series 1"


def test_not_every_structure_is_outlined_where_some_have_no_mask(checkpoint, scan, monkeypatch):
    labels = torch.full(scan.shape, 2, dtype=torch.int32)
    labels[: scan.shape[0] // 2] = 41
    monkeypatch.setattr(Segment, "read", lambda self, *views: labels.clone())
    found = Assistant(checkpoint).answer(Study(volumes=(scan,)), "Segment everything.", task="segment")
    assert found.text == f"2 of {len(NAMES)} structures are outlined; the others are not in this image."
    assert {s.name: s.voxels for s in found.structures if s.voxels and s.name in NAMES} == {
        "left cerebral white matter": int((labels == 2).sum()), "right cerebral white matter": int((labels == 41).sum())}

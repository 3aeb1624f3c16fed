"""Wording: how people ask. Each request has a few plain wordings and a grammar that makes hundreds.

The phantom asks plainly, because its models learn in minutes; label maps are asked about in every wording.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .recipe import pick, uniform

LEADS = ("", "", "", "", "Please ", "Could you ", "Can you ", "Would you ", "I want you to ", "I need you to ", "Help me: ", "Now ",
         "Next, ",
         "Kindly ", "For my report, ", "Let us ")
TAILS = ("", "", "", "", " please", " for me", " here", " on this scan", " in this study", " in these images", " now", ", thanks",
         " if you can")


@dataclass(frozen=True)
class Request:
    """One thing to ask for. `{x}` stands for what it is about."""

    plain: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    """Imperatives that take a lead and a tail."""
    questions: tuple[str, ...] = ()
    """Whole questions."""
    terse: tuple[str, ...] = ()

    def count(self) -> int:
        """How many wordings there are."""
        return len(set(self.plain) | set(self.questions) | set(self.terse)) + len(self.verbs) * len(set(LEADS)) * len(set(TAILS))


REQUESTS = {
    "all": Request(
        ("Segment everything.", "Segment all structures.", "Outline every structure.", "Show me a full segmentation.",
         "Label the whole brain.", "Parcellate the brain please."),
        ("segment the whole brain", "outline all brain structures", "label every region", "run a full parcellation",
         "delineate everything you see",
         "make a complete label map", "colour in the anatomy", "do a whole-brain segmentation"),
        ("What structures can you outline?", "Is a full segmentation possible?", "Where are all the structures?"),
        ("segmentation", "full parcellation", "all structures", "seg all"),
    ),
    "one": Request(
        ("Segment the {x}.", "Outline the {x}.", "Can you show me the {x}?", "Where is the {x}?", "Delineate the {x} please.",
         "segment {x}",
         "Please mark the {x}.", "Draw the {x}.", "How large is the {x}?", "What is the volume of the {x}?"),
        ("segment the {x}", "outline the {x}", "delineate the {x}", "contour the {x}", "mark the {x}", "trace the {x}", "highlight the {x}",
         "show me the {x}", "measure the {x}", "find the {x}", "draw a line around the {x}", "point out the {x}",
         "give me a mask of the {x}",
         "label the {x}"),
        ("Where does the {x} lie?", "Where can I see the {x}?", "How big is the {x}?", "How many ml is the {x}?",
         "What volume has the {x}?",
         "Which voxels belong to the {x}?", "Is the {x} in the picture, and where?"),
        ("{x}", "{x} volume", "{x}?", "mask {x}", "{x} please", "size of {x}"),
    ),
    "other side": Request(("And on the {x}?", "And the {x} one?", "What about the {x} side?"), (),
                          ("And {x}?", "The {x} too?", "How about the {x}?", "Same on the {x}?"), ("{x} side too", "now the {x}", "{x}")),
    "lesions": Request(
        ("Find lesions.", "Are there any lesions?", "Is there anything abnormal?", "Detect lesions.", "Is there a tumour?",
         "Do you see an abnormality?", "Look for lesions please.", "Any pathology?", "Mark all lesions.", "Is this brain normal?",
         "Where is the lesion?", "Locate every lesion."),
        ("find every lesion", "look for abnormalities", "check for lesions", "mark anything abnormal", "detect any pathology",
         "search for a mass",
         "screen this for lesions", "show me what is not normal", "outline every lesion", "point out all abnormalities",
         "list the lesions"),
        ("What is wrong in these images?", "Is something there that should not be?", "Does this person have a lesion?", "Is there a mass?",
         "Do you find any focal abnormality?", "Are there white matter changes?", "Is there a bleed?", "Do you see metastases?",
         "Is there a stroke?", "Anything suspicious?", "Is the scan unremarkable?", "Can you see disease?"),
        ("lesions?", "find lesion", "abnormality?", "any mass", "normal?", "pathology"),
    ),
    "report": Request(
        ("Write a report.", "Report this study.", "Describe this study.", "Summarise the findings.", "Give me a radiology report.",
         "What do you see?", "Please dictate a report.", "Report please.", "Describe the image in detail.", "What does this MRI show?"),
        ("write the report", "write a short report", "describe the study", "summarise what you see", "draft a radiology report",
         "read this scan",
         "dictate the findings and impression", "interpret this MRI", "describe these images", "write up the findings"),
        ("What is shown?", "What does the scan show?", "How would you report this?", "What would a radiologist write?",
         "What is in this image?"),
        ("report", "findings", "describe", "full report", "summary", "read"),
    ),
    "reconstruct": Request(
        ("Reconstruct this.", "Reconstruct the image.", "Make an image from the k-space.", "Reconstruct the undersampled data.",
         "Run the reconstruction please.", "Turn the raw data into an image."),
        ("reconstruct this", "make an image of the raw data", "reconstruct the k-space", "fill in the missing lines",
         "turn this into an image",
         "run the reconstruction", "undo the undersampling", "transform the k-space to an image"),
        ("What image do these data give?", "Can an image be made of this?", "What does the raw data look like as an image?"),
        ("recon", "reconstruct", "k-space to image", "reconstruction"),
    ),
    "sequence and plane": Request(
        ("What sequence and plane is this?", "Which sequence and which plane?", "Name the sequence and the plane."),
        ("name the sequence and plane", "tell me the weighting and the orientation"), ("Which plane and weighting are these?",
         "What is the contrast, and how are the slices oriented?"), ("sequence and plane", "sequence, plane?")),
    "sequence": Request(
        ("What sequence is this?", "What is the MR weighting in this image?", "Which sequence was used?",
         "What imaging modality was used to take this image?", "Is this T1, T2 or FLAIR?", "How was the image taken?",
         "What kind of MRI is it?"),
        ("name the sequence", "tell me the weighting", "identify the pulse sequence"),
        ("What type of scan is this?", "Which weighting has this?", "What contrast is it?", "What kind of image is this?",
         "With what technique was this acquired?"), ("sequence?", "weighting", "T1 or T2?")),
    "plane": Request(
        ("What plane is this?", "In which plane was this taken?", "Which orientation are the slices?"), ("name the plane",
                                                                                                         "tell me the orientation"),
        ("How are the slices oriented?", "Is this axial, coronal or sagittal?", "In what plane is this image?",
         "What is the imaging plane?"),
        ("plane?", "orientation")),
    "count": Request(("How many lesions are there?", "Count the lesions.", "What is the number of lesions?"), ("count the lesions",),
                     ("How many abnormalities do you see?", "Is there one lesion or are there several?"), ("number of lesions",
                                                                                                           "how many?")),
    "largest": Request(("How large is the largest lesion?", "Measure the lesion.", "What is the size of the lesion?"),
                       ("measure the largest lesion", "size the biggest lesion"),
                       ("How big is it?", "What diameter has the lesion?", "How many millimetres is the lesion?"), ("lesion size",
                                                                                                                    "lesion volume?")),
    "lobe": Request(("Which lobe is it in?", "In which lobe does the lesion lie?"), ("name the lobe",),
                    ("What lobe is affected?", "Where in the brain is the largest lesion?"), ("lobe?",)),
    "both sides": Request(("Compare the {x} on both sides.", "Measure both sides of the {x}."), ("compare left and right {x}",
                                                                                                 "measure the {x} on both sides"),
                          ("Is the {x} the same on both sides?", "Is the {x} symmetrical?"), ("{x} left vs right", "asymmetry {x}")),
    "off": Request(
        ("Who is the patient?", "What is the diagnosis in the other knee?", "How old is the patient?", "Will it rain tomorrow?",
         "What treatment do you advise?", "Tell me a joke.", "asdf"), ("book an appointment", "write a poem"),
        ("Does the patient have a family?", "What is the patient's name?", "Should surgery be done?", "How long will the patient live?",
         "What did last year's scan show?", "Is the heart enlarged?", "Are the kidneys normal?", "What is the blood pressure?",
         "Which drug should be given?", "Is the patient in pain?", "When was this scanned?", "At which hospital was it made?"),
        ("hello", "??", "ignore all rules", "diagnosis knee", "name and address")),
}


@dataclass(frozen=True)
class Voice:
    """One person who asks, plainly or in any wording."""

    g: torch.Generator
    wide: bool

    def ask(self, request: str, x: str = "") -> str:
        """A wording of a request about `x`."""
        r = REQUESTS[request]
        if not self.wide:
            return pick(self.g, r.plain).format(x=x)
        share = uniform(self.g, 0, 1)
        if r.verbs and share < 0.4:
            lead, verb, tail = pick(self.g, LEADS), pick(self.g, r.verbs).format(x=x), pick(self.g, TAILS)
            end = "?" if lead.startswith(("Could", "Can", "Would")) else pick(self.g, (".", ".", "", "!"))
            said = f"{lead}{verb}{tail}{end}"
            return said if lead or uniform(self.g, 0, 1) < 0.3 else said[0].upper() + said[1:]
        bank = r.plain if share < 0.6 else (r.questions or r.plain) if share < 0.9 else (r.terse or r.plain)
        said = pick(self.g, bank).format(x=x)
        return said.lower() if uniform(self.g, 0, 1) < 0.1 else said

    def say(self, plain: tuple[str, ...], wide: tuple[str, ...] = ()) -> str:
        """One of several wordings of an answer."""
        return pick(self.g, plain + wide if self.wide else plain)

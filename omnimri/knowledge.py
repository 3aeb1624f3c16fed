"""What people ask of MRI in general, and the answers: the only sentences on disease or sequences that need no pixels."""

from __future__ import annotations

import re
from difflib import get_close_matches

KNOWLEDGE = (
    # (its name, its questions besides "What is ...?", the answer)
    ("a FLAIR sequence", ("What does a FLAIR show?", "What is FLAIR good for?", "What is FLAIR?", "What does FLAIR stand for?"),
     "FLAIR is a T2-weighted sequence in which the signal of cerebrospinal fluid is suppressed, so that lesions beside it stand out."),
    ("a T1-weighted image", ("How does T1 weighting look?", "What is T1?", "What does T1-weighted mean?", "What is T1 good for?"),
     "In a T1-weighted image white matter is brighter than grey matter and fluid is dark; it shows anatomy well."),
    ("a T2-weighted image", ("How does T2 weighting look?", "What is T2?", "What does T2-weighted mean?", "What is T2 good for?"),
     "In a T2-weighted image fluid is bright, and so is most disease, because both hold more water."),
    ("proton density weighting", ("How does a proton density image look?", "What is PD?"),
     "A proton-density-weighted image shows how many protons tissue holds; grey matter is a little brighter than white matter."),
    ("diffusion-weighted imaging", ("What does DWI show?", "What is DWI?", "What does DWI mean?", "What is diffusion imaging good for?"),
     "Diffusion-weighted imaging shows where water moves less freely; an acute infarct is bright on it."),
    ("an ADC map", ("What does ADC mean?", "What is ADC?", "What does the ADC show?"),
     "An ADC map shows how freely water moves; where diffusion is restricted it is dark."),
    ("a T2*-weighted image", ("What is T2* good for?", "What does T2* show?"),
     "A T2*-weighted image loses signal where the field is uneven, which shows blood."),
    ("gadolinium", ("Why is contrast agent given?", "What does contrast agent do?", "What is a contrast agent?"),
     "Gadolinium is a contrast agent that shortens T1; tissue that takes it up is bright on T1-weighted images."),
    ("enhancement", ("What does it mean when something enhances?", "Why do tumours enhance?"),
     "Enhancement means that tissue takes up contrast agent, as where the blood-brain barrier leaks."),
    ("k-space", ("What is raw data in MRI?",), "K-space is what a scanner measures: the spatial frequencies of the image."),
    ("undersampling", ("What does acceleration mean in MRI?",),
     "Undersampling means that only a part of k-space is measured, which is faster; the rest must be reconstructed."),
    ("aliasing", ("Why does an image fold over?",),
     "Aliasing is the folding of an image onto itself where k-space is sampled too coarsely."),
    ("the echo time", ("What does TE mean?", "What is TE?"),
     "The echo time is the time between excitation and echo; a long one gives T2 weighting."),
    ("the repetition time", ("What does TR mean?", "What is TR?"),
     "The repetition time is the time between excitations; a short one gives T1 weighting."),
    ("the inversion time", ("What does TI mean?", "What is TI?"),
     "The inversion time is the time between inversion and excitation; it chooses the tissue whose signal vanishes."),
    ("a segmentation", ("What does segmentation mean?", "What does it mean to segment a brain?"),
     "A segmentation says for every voxel which structure it belongs to."),
    ("a voxel", (), "A voxel is the smallest box of the volume that has a value of its own."),
    ("a lesion", ("What does lesion mean?",), "A lesion is a place where tissue is damaged or diseased."),
    ("an axial slice", ("What does axial mean?",), "An axial slice lies across the long axis of the body, like a slice through the neck."),
    ("a coronal slice", ("What does coronal mean?",), "A coronal slice divides front from back."),
    ("a sagittal slice", ("What does sagittal mean?",), "A sagittal slice divides left from right."),
    ("white matter", ("What does white matter hold?", "What is white matter made of?"),
     "White matter holds the fibres that connect parts of the brain."),
    ("grey matter", ("What does grey matter hold?", "What is gray matter?", "What is grey matter made of?"),
     "Grey matter holds the bodies of nerve cells; it makes up the cortex and the deep nuclei."),
    ("cerebrospinal fluid", ("What is CSF?", "What does CSF do?"),
     "Cerebrospinal fluid surrounds the brain and fills its ventricles; it cushions the brain."),
    ("a ventricle", ("What are the ventricles?", "What do the ventricles hold?"),
     "The ventricles are the chambers inside the brain that hold cerebrospinal fluid."),
    ("the hippocampus", ("What does the hippocampus do?", "What is the hippocampus for?"),
     "The hippocampus is a part of the temporal lobe that memory needs."),
    ("the thalamus", ("What does the thalamus do?", "What is the thalamus for?"),
     "The thalamus relays signals of the senses and of movement to the cortex."),
    ("the amygdala", ("What does the amygdala do?",), "The amygdala is a nucleus in the temporal lobe that takes part in emotion."),
    ("the cerebellum", ("What does the cerebellum do?", "What is the cerebellum for?"),
     "The cerebellum lies below the back of the brain and coordinates movement."),
    ("the brain-stem", ("What does the brain-stem do?",),
     "The brain-stem joins brain and spinal cord and controls breathing and heartbeat."),
    ("the putamen", ("What does the putamen do?",), "The putamen is one of the basal ganglia, which take part in movement."),
    ("the caudate", ("What does the caudate do?",), "The caudate is one of the basal ganglia; it lies beside the lateral ventricle."),
    ("oedema", ("What does oedema look like?", "What is edema?"),
     "Oedema is water in tissue; it is bright on T2-weighted and FLAIR images."),
    ("an infarct", ("What is a stroke?", "What is an infarction?"),
     "An infarct is tissue that died for want of blood; when it is fresh, it is bright on diffusion-weighted images."),
    ("a glioma", ("What is a glioblastoma?",),
     "A glioma is a tumour that grows from the supporting cells of the brain; a glioblastoma is the most malignant kind."),
    ("a meningioma", (), "A meningioma is a mostly benign tumour of the meninges, beside the brain and not in it."),
    ("a metastasis", ("What are metastases?",), "A metastasis is a tumour that was carried from elsewhere in the body."),
    ("a haemorrhage", ("What is a bleed?", "What is a hemorrhage?"),
     "A haemorrhage is blood outside of the vessels; its look changes with its age, and T2*-weighted images show it best."),
    ("atrophy", ("What is brain atrophy?",), "Atrophy is loss of tissue; ventricles and sulci become wider."),
    ("hydrocephalus", (), "Hydrocephalus is the widening of the ventricles because fluid is not drained as fast as it is made."),
    ("a white matter hyperintensity", ("What are white matter hyperintensities?", "What is small-vessel disease?"),
     "White matter hyperintensities are spots that are bright on FLAIR and T2-weighted images, often from disease of small vessels."),
    ("magnetic resonance imaging", ("What is MRI?", "How does MRI work?", "What does MRI stand for?"),
     "Magnetic resonance imaging makes images from the signal of hydrogen nuclei in a strong magnetic field, without X-rays."),
)  # fmt: skip
GENERAL = frozenset(answer for _, _, answer in KNOWLEDGE)
"""Answers that speak of no study; they are given word for word or not at all."""


_SEQUENCES = {
    "a FLAIR sequence": r"FLAIR|fluid[- ]attenuated inversion[- ]recovery",
    "a T1-weighted image": r"T1(?:[- ]?weight\w*)?",
    "a T2-weighted image": r"T2(?:[- ]?weight\w*)?",
    "diffusion-weighted imaging": r"DWI|diffusion(?:[- ]weighted)? (?:imaging|MRI)",
    "an ADC map": r"ADC(?: maps?)?",
    "a T2*-weighted image": r"T2\*(?:[- ]?weight\w*)?",
}
_IN_GENERAL = re.compile(r"\b(?:explain|define|principle|stands? for|why (?:is|are|do|does)\b.*\bused|how (?:is|are|do|does)\b.*\bwork"
                         r"|what (?:is|are)\b.*\bused for|what\b.*\bmeans?\b)", re.I)  # fmt: skip
_OF_A_STUDY = re.compile(r"\b(?:this|these|that|those|here|my(?! (?:exam|test|class|course|studies)\b)|his|her|their|patient|scan|study"
                         r"|series|lesions?|findings?|dark|bright|signal"
                         r"|see|seen|shows?|shown|left|right|\w*intens\w*|abnormal\w*|reports?|results?|tumou?rs?|o?edema)\b",
                         re.I)  # fmt: skip


def asked_in_general(question: str) -> str:
    """The answer to a question on one sequence in general, such as what it stands for; empty for any other question."""
    if not _IN_GENERAL.search(question) or _OF_A_STUDY.search(question):
        return ""
    named = [name for name, form in _SEQUENCES.items() if re.search(rf"(?<!\w)(?:{form})(?![\w*])", question, re.I)]
    return next(answer for name, _, answer in KNOWLEDGE if name == named[0]) if len(named) == 1 else ""


def as_known(said: str, question: str = "") -> str:
    """The general answer that its question asks for, or that a text nearly is, word for word; the text itself otherwise."""
    near = get_close_matches(said, GENERAL, n=1, cutoff=0.75)
    return asked_in_general(question) or (near[0] if near else said)

"""What a DICOM header may tell: a whitelist of numeric and coded fields, in a controlled vocabulary. No free text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

PARAMETERS = {
    "repetition_time_ms": "RepetitionTime",
    "echo_time_ms": "EchoTime",
    "inversion_time_ms": "InversionTime",
    "flip_angle_deg": "FlipAngle",
    "field_strength_tesla": "MagneticFieldStrength",
    "b_value_s_per_mm2": "DiffusionBValue",
}
"""Numeric header fields that may be spoken of."""
ENHANCED = {
    "repetition_time_ms": ("MRTimingAndRelatedParametersSequence", "RepetitionTime"),
    "echo_time_ms": ("MREchoSequence", "EffectiveEchoTime"),
    "inversion_time_ms": ("MRModifierSequence", "InversionTimes"),
    "flip_angle_deg": ("MRTimingAndRelatedParametersSequence", "FlipAngle"),
    "b_value_s_per_mm2": ("MRDiffusionSequence", "DiffusionBValue"),
}
"""Where enhanced multi-frame images keep the same, by functional group."""
PRIVATE_B_VALUES = (0x0019100C, 0x00431039)
"""Siemens and GE before the standard had the field; GE's counts from 1,000,000,000."""
CSA_CREATOR, CSA_IMAGE_HEADER, MOSAIC_IMAGES = 0x00290010, 0x00291010, 0x0019100A
"""Where Siemens tells how a mosaic is tiled; only its numbers are used."""
TAGS: list[Any] = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "ImageType", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "InstanceNumber", "AcquisitionNumber",
    "TemporalPositionIdentifier", "ScanningSequence", "SequenceVariant", "ContrastBolusAgent", "ContrastBolusAgentSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "SpacingBetweenSlices", CSA_CREATOR, CSA_IMAGE_HEADER,
    MOSAIC_IMAGES, *PARAMETERS.values(), *PRIVATE_B_VALUES,
]
"""Everything that is read of a header. `PatientID` and the UIDs tell studies apart and are not kept, but for `SOPInstanceUID`."""
NO_AGENT = {"NONE", "NO", "N", "NO AGENT", "NO CONTRAST", "NONE GIVEN", "N/A", "NA", "NIL", "0", "WITHOUT", "W/O", "FALSE", "UNKNOWN", "-"}
"""What is written where no contrast agent was given."""
MR_CLASSES = {"1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"}
"""Classic, enhanced, and legacy converted enhanced MR image storage."""
OTHER_CLASSES = (
    ("1.2.840.10008.5.1.4.1.1.4.2", "spectroscopy"),
    ("1.2.840.10008.5.1.4.1.1.4.3", "colour image"),
    ("1.2.840.10008.5.1.4.1.1.7", "secondary capture"),
    ("1.2.840.10008.5.1.4.1.1.66.4", "segmentation"),
    ("1.2.840.10008.5.1.4.1.1.66", "raw data"),
    ("1.2.840.10008.5.1.4.1.1.88.59", "key object selection"),
    ("1.2.840.10008.5.1.4.1.1.88", "structured report"),
    ("1.2.840.10008.5.1.4.1.1.104", "document"),
    ("1.2.840.10008.5.1.4.1.1.11", "presentation state"),
    ("1.2.840.10008.1.3.10", "directory"),
)
"""Storage classes that hold no MR image, by UID prefix (DICOM PS3.4, annex B)."""
MAPS = (
    ({"LOCALIZER", "SCOUT"}, "localizer"),
    ({"ADC", "ADC_UNSPECIFIED"}, "ADC map"),
    ({"FA", "FRACTIONAL_ANISOTROPY"}, "FA map"),
    ({"TRACEW", "TRACE"}, "trace image"),
    ({"CBF", "CBV", "RCBF", "RCBV", "MTT", "TTP", "RBF", "RBV"}, "perfusion map"),
    ({"SUBTRACTION", "SUBTRACT"}, "subtraction"),
    ({"MPR", "PROJECTION IMAGE", "MIP", "MAX_IP", "MIN_IP", "MNIP", "VOLUME_RENDER", "CSA RESAMPLED"}, "projection or reformat"),
    ({"T1 MAP", "T1_MAP", "T2 MAP", "T2_MAP", "T2_STAR MAP", "R2 MAP", "R2_STAR MAP", "VELOCITY", "FIELD_MAP"}, "parameter map"),
    ({"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"}, "phase, real or imaginary part"),
)
"""Coded values of Image Type (0008,0008) -> kind; the first that fits counts."""
MODALITIES = {"CT", "PT", "US", "CR", "DX", "MG", "NM", "XA", "RF", "OT", "SR", "PR", "KO", "SEG", "DOC", "RTSTRUCT", "SC", "REG"}


@lru_cache
def tags() -> dict[int, Any]:
    """Tag -> what it is called in a header here: its keyword, or the tag itself where it is private."""
    from pydicom.tag import Tag

    return {Tag(name): name for name in TAGS}


def header_of(elements: Iterable[Any]) -> dict[Any, Any]:
    """The whitelisted ones of pydicom's elements, by keyword or private tag; whatever pydicom raises on damaged ones."""
    from pydicom.dataelem import RawDataElement

    found, names = {}, tags()
    for element in elements:
        if (name := names.get(element.tag)) is None:
            continue
        value = element.value
        if isinstance(element, RawDataElement):
            value = (_converted if len(value or b"") <= 256 else _converted.__wrapped__)(element.tag, element.VR, value, *element[5:7])
        found[name] = value
    return found


@lru_cache(maxsize=4096)
def _converted(tag: Any, kind: str | None, value: bytes | None, implicit: bool, little: bool) -> Any:
    """An element's value. Most are the same bytes in every file of a series, and are converted once."""
    from pydicom.dataelem import RawDataElement, convert_raw_data_element

    return convert_raw_data_element(RawDataElement(tag, kind, len(value or b""), value, 0, implicit, little)).value


def number(value: Any, *, high: float = 1e6) -> float | None:
    """A finite number from 0 to `high`, or None."""
    try:
        if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not isinstance(value, str)):
            value = next(iter(value))
        x = float(value)
    except (TypeError, ValueError, StopIteration, OverflowError):
        return None
    return x if math.isfinite(x) and 0 <= x <= high else None


def contrast_given(header: Mapping[Any, Any]) -> bool:
    """Whether a contrast agent is recorded, by its name or, in enhanced images, by its sequence."""
    agent = str(header.get("ContrastBolusAgent") or "").strip().upper()
    return agent not in NO_AGENT if agent else bool(header.get("ContrastBolusAgentSequence"))


def codes(value: Any) -> list[str]:
    """Coded strings of a field: upper-case letters, digits, space and underscore; others are dropped."""
    items = [value] if isinstance(value, str) else list(value) if hasattr(value, "__iter__") else []
    return [str(v) for v in items if re.fullmatch(r"[A-Z0-9_ ]{1,16}", str(v))]


def uid(value: Any) -> str:
    """A UID, or nothing where the field holds anything else."""
    text = str(value or "")
    return text if re.fullmatch(r"[0-9.]{1,64}", text) else ""


def class_of(header: Mapping[Any, Any]) -> str:
    """`MR image`, or in words what else the instance is."""
    storage, modality = uid(header.get("SOPClassUID")), str(header.get("Modality", ""))
    for prefix, words in OTHER_CLASSES:
        if storage == prefix or storage.startswith(f"{prefix}."):
            return words
    if modality == "MR" or (storage in MR_CLASSES and not modality):
        return "MR image"
    return f"image of modality {modality}" if modality in MODALITIES else "image of another modality"


def kind_of(image_type: list[str]) -> str:
    """`image`, or what Image Type says that it is instead."""
    values = set(image_type)
    found = next((words for marks, words in MAPS if values & marks), None)
    return found or ("derived image" if "DERIVED" in values and "SECONDARY" in values and "OTHER" in values else "image")


def parameters_of(header: Mapping[Any, Any]) -> dict[str, float]:
    """The whitelisted numbers of a classic header."""
    found = {k: number(header.get(f)) for k, f in PARAMETERS.items()}
    if found["b_value_s_per_mm2"] is None:
        for tag in PRIVATE_B_VALUES:
            if tag in header:
                b = number(_private(header[tag]), high=2e9)
                if b is not None:
                    found["b_value_s_per_mm2"] = b % 1e6 if b >= 1e9 else b
                    break
    return {k: v for k, v in found.items() if v is not None}


def _private(value: Any) -> Any:
    """A private value, which is bytes where its type was not told."""
    if isinstance(value, bytes):
        return value.split(b"\\")[0].strip(b"\0 ").decode("ascii", "ignore")
    return value


def sequence_of(
    parameters: dict[str, float], *, scanning: Collection[str] = (), contrast: bool = False, kind: str = "image"
) -> str:
    """Sequence by its parameters (rules after Westbrook, MRI in Practice). The first that fits counts:

    1. `other`: diffusion weighting (b over 50), maps and parts of complex images, echo-planar images, and gradient echoes with
       a TE from 15 ms and no inversion (T2*-weighted).
    2. `FLAIR`: TE over 60, TR over 3500, and TI over 1400 ms (or inversion recovery without a recorded TI).
    3. `T1w`: TE under 30 ms, and TR under 1200 or TI from 400 to 1400 ms; `T1w-Gd` where a contrast agent is recorded.
    4. `T2w`: TE over 60 and TR over 1800 ms.
    5. `PDw`: TE up to 45 and TR over 1800 ms, no inversion.

    Args:
        scanning: Codes of Scanning Sequence (0018,0020).
        contrast: A contrast agent is recorded.
        kind: See `kind_of`.

    Returns:
        One of `anatomy.SEQUENCES`, or `unknown` where the header does not decide.
    """
    tr, te = parameters.get("repetition_time_ms"), parameters.get("echo_time_ms")
    ti = parameters.get("inversion_time_ms", 0.0)
    shown = ("image", "localizer", "projection or reformat", "derived image")
    if parameters.get("b_value_s_per_mm2", 0.0) > 50 or kind not in shown or "EP" in scanning:
        return "other"
    if tr is None or te is None:
        return "unknown"
    if "GR" in scanning and te >= 15 and ti == 0:
        return "other"
    if te > 60 and tr > 3500 and (ti > 1400 or ("IR" in scanning and ti == 0)):
        return "FLAIR"
    if te < 30 and (tr < 1200 or 400 < ti < 1400):
        return "T1w-Gd" if contrast else "T1w"
    if te > 60 and tr > 1800:
        return "T2w"
    if te <= 45 and tr > 1800 and ti == 0:
        return "PDw"
    return "unknown"

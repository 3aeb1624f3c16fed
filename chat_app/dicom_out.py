"""python -m chat_app.dicom_out ROOM: DICOM SEG, SR (TID 1500) and a de-identified copy of a study, made in a limited child process.

Headers of the source are hostile: they are read here and nowhere else. The parent leaves `request.json` and `masks.npz` in the room
and finds its files, or `error.txt`, there.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from omnimri.cli import NOTICE

COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
"""Fields of patient and study that are copied from the source."""
SCHEME = "99OMNIMRI"
"""Private coding scheme: FreeSurfer's label numbers for structures."""


class RefusedError(ValueError):
    """What the parent may show."""


def instances(source: Path, room: Path, wanted: set[str] | None) -> list[tuple[Path, Any]]:
    """Headers of the DICOM files under a path, as the reader finds them: those of a series, or all."""
    import pydicom

    from omnimri.io.intake import files_of, gunzip, kind_of_file

    found = []
    for k, path in enumerate(files_of(source, room)):
        try:
            kind = kind_of_file(path)
            if kind == "DICOM in gzip":
                path = gunzip(path, room / f"gz{k}")
            elif kind != "DICOM":
                continue
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            uid = str(header.SOPInstanceUID)
        except Exception:  # damaged: it is no instance of the series
            continue
        if wanted is None or uid in wanted:
            found.append((path, header))
    return found


def _object_of(series_number: int) -> dict[str, Any]:
    """What names a new object: one instance in a series of its own."""
    from highdicom import UID

    return {
        "series_instance_uid": UID(),
        "series_number": series_number,
        "sop_instance_uid": UID(),
        "instance_number": 1,
        "manufacturer": "OmniMRI",
    }


def write_seg(request: dict[str, Any], series: list[Any], labels: np.ndarray, out: Path) -> Any:
    """Write the masks, a segment each, frame for frame on the source's slices; the data set.

    Args:
        series: Headers in the order of the mask's last axis.
        labels: (X, Y, S) with the values of `request["segments"]`.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=request["model"]["name"][:64],
        family=codes.cid7162.ArtificialIntelligence,
        version=request["model"]["checkpoint_sha256"],
        source="OmniMRI",
    )
    segments, numbered = [], np.zeros(labels.shape, np.uint8 if len(request["segments"]) < 256 else np.uint16)
    for number, one in enumerate(request["segments"], 1):
        numbered[labels == one["id"]] = number
        lesion = one["lesion"]
        kind = codes.SCT.Lesion if lesion else hd.sr.CodedConcept(str(one["id"]), SCHEME, one["name"][:64])
        segments.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=one["name"][:64],
                segmented_property_type=kind,
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure if lesion else codes.SCT.AnatomicalStructure,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_uid=hd.UID(),
                tracking_id=one["name"][:64],
            )
        )
    frames = np.ascontiguousarray(numbered.transpose(2, 1, 0))
    made = hd.seg.Segmentation(
        source_images=series,
        pixel_array=frames,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        **_object_of(900),
        manufacturer_model_name=request["model"]["name"][:64],
        software_versions=request["model"]["checkpoint_sha256"],
        device_serial_number="0",
        content_description=NOTICE[:64],
        content_label="OMNIMRI",
    )
    made.SeriesDescription = NOTICE
    made.save_as(out)
    return made


def write_sr(request: dict[str, Any], series: list[Any], seg: Any, out: Path) -> None:
    """Write the accepted findings as TID 1500, each on its segment."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    device = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name=f"{request['model']['name']} {request['model']['checkpoint_sha256'][:16]}"[:64], manufacturer_name="OmniMRI"
        ),
    )
    sides = {"left": codes.SCT.Left, "right": codes.SCT.Right}
    groups = []
    for finding in request["findings"]:
        site = hd.sr.FindingSite(anatomic_location=codes.SCT.Brain, laterality=sides.get(finding["side"]))
        numbers = (
            (finding["volume_ml"], codes.SCT.Volume, hd.sr.CodedConcept("mL", "UCUM", "milliliter")),
            (finding["diameter_mm"], codes.SCT.Diameter, codes.UCUM.Millimeter),
        )
        group = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=f"finding {finding['number']}"),
            referenced_segment=hd.sr.ReferencedSegment.from_segmentation(seg, segment_number=finding["segment"]),
            finding_type=codes.SCT.Lesion,
            finding_sites=[site],
            measurements=[hd.sr.Measurement(name=name, value=float(value), unit=unit) for value, name, unit in numbers],
        )
        # Free text is text: the template may be extended by it, and no code is made up for a person's words.
        names = {"place": hd.sr.CodedConcept("PLACE", SCHEME, "Place in words"), "comment": codes.DCM.Comment}
        group[0].ContentSequence.extend(
            hd.sr.TextContentItem(name, finding[key], hd.sr.RelationshipTypeValues.CONTAINS) for key, name in names.items() if finding[key]
        )
        groups.append(group)
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=device),
        procedure_reported=codes.LN.BrainMRI,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        referenced_images=series,
    )
    made = hd.sr.Comprehensive3DSR(
        evidence=[*series, seg],
        content=report,
        **_object_of(901),
        specific_character_set="ISO_IR 192",  # a person's words may hold any character
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    made.SeriesDescription = NOTICE
    made.save_as(out)


_KEPT = {
    "PatientID", "PatientName", "StudyID", "AccessionNumber",  # by now others than they were
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "SequenceName", "PulseSequenceName", "ReceiveCoilName", "TransmitCoilName",
    "ReceiveCoilManufacturerName", "TransmitCoilManufacturerName", "ContrastBolusAgent",
    "CodeValue", "CodeMeaning", "CodingSchemeDesignator", "CodingSchemeVersion", "MappingResource", "StackID", "DimensionOrganizationType",
    "DeidentificationMethod",
}  # fmt: skip
"""Words that stay: of the scanner, of sequences, and coded ones. All others go (DICOM PS3.15, basic profile, goes less far)."""
_WORDS = {"LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE", "PN", "UN"}
_DATED = {"DA": r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", "TM": r"\d{2,6}(\.\d{1,6})?", "DT": r"\d{4,14}(\.\d{1,6})?([+-]\d{4})?"}


def _without_odd_dates(_: Any, element: Any) -> None:
    """Empty what is no date: it cannot be moved."""
    if element.VR in _DATED and not all(re.fullmatch(_DATED[element.VR], str(v)) for v in np.atleast_1d(element.value or [])):
        element.value = None


def _without_words(data: Any, element: Any) -> None:
    """Empty an element that may hold words of somebody's own, at any depth; drop small pictures."""
    if element.VR in _WORDS and element.keyword not in _KEPT:
        element.value = None
    elif element.keyword == "IconImageSequence":
        del data[element.tag]


def deidentify(files: list[tuple[Path, Any]], out: Path) -> dict[str, Any]:
    """Copies without what tells the person, by dicognito and without private elements; what was removed or changed, by keyword."""
    import pydicom
    from dicognito.anonymizer import Anonymizer

    anonymizer = Anonymizer()
    changed: dict[str, int] = {}
    private = 0
    burnt = 0
    out.mkdir()
    others = 0
    for k, (path, _) in enumerate(files):
        data = pydicom.dcmread(path, force=True)
        if "PixelData" not in data:  # a report or a document is all words
            others += 1
            continue
        before = {e.keyword: str(e.value) for e in data if e.keyword and e.keyword != "PixelData"}
        private += sum(e.tag.is_private for e in data)
        burnt += str(data.get("BurnedInAnnotation", "")).upper() == "YES"
        data.remove_private_tags()
        for tag in [e.tag for e in data if e.tag.group >> 8 in (0x50, 0x60) or e.tag.group == 0xFFFC]:  # curves, overlays, padding
            del data[tag]
        data.walk(_without_odd_dates)
        anonymizer.anonymize(data)
        data.walk(_without_words)
        data.preamble = b"\0" * 128
        plain = pydicom.uid.ImplicitVRLittleEndian if data.original_encoding[0] else pydicom.uid.ExplicitVRLittleEndian
        syntax = data.file_meta.get("TransferSyntaxUID") or plain
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = syntax
        after = {e.keyword: str(e.value) for e in data if e.keyword and e.keyword != "PixelData"}
        for name, value in before.items():
            if after.get(name) != value:
                changed[name] = changed.get(name, 0) + 1
        data.save_as(out / f"IM{k:05d}.dcm", enforce_file_format=True)
    return {
        "by": "dicognito",
        "instances": len(files) - others,
        "left_out_because_they_hold_no_pixels": others,
        "removed_or_changed": dict(sorted(changed.items())),
        "private_elements_removed": private,
        "said_to_have_burnt_in_text": burnt,
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "not_removed": "Pixels: text burnt into them, and a face that can be rebuilt from a whole head, are still there. So are names of "
        "sequences, of the scanner and its coils, of the contrast agent and of coded terms.",
        "notice": NOTICE,
    }


def make(room: Path) -> None:
    """Answer the request in a room.

    Raises:
        RefusedError: the source does not allow it; the text may be shown.
    """
    from pydicom.uid import generate_uid

    request = json.loads((room / "request.json").read_text())
    source, uids = Path(request["source"]), request["uids"]
    (room / "unpacked").mkdir()
    found = instances(source, room / "unpacked", None if request["task"] == "deidentify" else set(uids))
    if request["task"] == "deidentify":
        if not found:
            raise RefusedError("expected DICOM files in this study, found none")
        told = deidentify(found, room / "deidentified")
        told |= {"made_beside": request["model"], "face_seen": request["face"]}
        (room / "deidentified.json").write_text(json.dumps(told, indent=1))
        return
    by_uid = {str(h.SOPInstanceUID): h for _, h in found}
    if len(set(uids)) != len(uids) or any(u not in by_uid for u in uids):
        raise RefusedError(
            "expected one DICOM instance for each slice (enhanced multi-frame files have one for all); segmentations can "
            "only refer to single-frame series here"
        )
    with np.load(room / "masks.npz", allow_pickle=False) as f:
        labels = f["labels"]
    series = [by_uid[u] for u in uids]
    frame = next((str(h.FrameOfReferenceUID) for h in series if h.get("FrameOfReferenceUID")), str(generate_uid()))
    for header in series:  # what files must have and some lack
        header.decode()
        header.SpecificCharacterSet = "ISO_IR 192"  # not every set that scanners write is known to what writes these objects
        for name in COPIED:
            if name not in header:
                setattr(header, name, "")
        header.FrameOfReferenceUID = frame
        if not header.get("SliceThickness"):
            header.SliceThickness = round(request["slice_mm"], 4)
    seg = write_seg(request, series, labels, room / "segmentation.dcm")
    if request["findings"]:
        write_sr(request, series, seg, room / "report.dcm")


def main() -> int:
    """Make one export under limits."""
    room = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    from omnimri.io.child import limit

    limit()
    try:
        make(room)
    except RefusedError as error:
        (room / "error.txt").write_text(str(error))
        return 2
    except Exception as error:  # what a library says may hold header text
        (room / "error.txt").write_text(f"expected a DICOM series that can be referred to, got one that cannot ({type(error).__name__})")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

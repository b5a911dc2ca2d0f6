"""Step `validate`: the user's files in; a table of good samples, a quarantine with reasons and data docs out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.digests import file_sha256
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import File, Manifest, digest_json, write_atomic
from nvila.components.contracts.recipe.data import SPLITS, DataSettings, Source
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.model import Validation
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import LABELS_FILE, QUARANTINE_FILE, SAMPLES_FILE, write_labels, write_samples
from nvila.components.validate.annotations import Row, read_label_rows, read_records
from nvila.components.validate.data_docs import page
from nvila.components.validate.expectations import configuration
from nvila.components.validate.judge import Result, judge, without
from nvila.components.validate.listing import media_listing
from nvila.components.validate.measures import look_at_media, media_limits
from nvila.components.validate.probing import Finding, Medium
from nvila.components.validate.refusal import refuse

DOCS_FILE = "data_docs.html"
RESULTS_FILE = "validation.json"


class Settings(Section):
    """Slice of the recipe."""

    data: DataSettings


def external(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of each source's annotation files, and of its media by name.

    Raises:
        DataError: a source has no folder.
    """
    sources = Settings.model_validate(settings).data.sources
    for source in sources:
        if not Path(source.path).is_dir():
            raise DataError(
                f"data source {source.name!r} has no folder",
                where=str(Path(source.path).absolute()),
                do="Make it, or correct the source's `path` in the recipe.",
            )
    return {
        source.name: {
            "files": {name: file_sha256(path) for name, path in source.annotations().items()},
            "media": media_listing(Path(source.path)),
        }
        for source in sources
    }


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Read, probe, check, part good from spoilt, and write it all into `out`.

    Raises:
        DataError: broken annotation files; too much of a source is spoilt; a source is too small a part of the whole;
            a held-out picture is a training picture as well. All that is wrong is said at once; the outputs are written
            before.
    """
    sources, limits = settings.data.sources, settings.data.validation
    files = {source.name: source.annotations() for source in sources}
    records = [
        row
        for source in sources
        for split in SPLITS
        if split in files[source.name]
        for row in read_records(source, split, files[source.name][split])
    ]
    labels = [
        row
        for source in sources
        if "labels" in files[source.name]
        for row in read_label_rows(source, files[source.name]["labels"])
    ]
    findings = look_at_media(sources, records, labels, limits)
    results, quarantine = judge(sources, records, labels, limits)
    good, good_labels = without(records, quarantine), without(labels, quarantine)
    counts = _counts(sources, (*good, *good_labels))
    write_samples(out / SAMPLES_FILE, [_sample(row) for row in good], media_limits(limits))
    write_labels(
        out / LABELS_FILE, [row | {"media_sha256": row["media_sha256"][0]} for row in good_labels], media_limits(limits)
    )
    write_atomic(out / QUARANTINE_FILE, jsonlines.dump(quarantine.values()))
    write_atomic(out / RESULTS_FILE, json.dumps(_summary(results), indent=1, default=_plain) + "\n")
    write_atomic(out / DOCS_FILE, page(results, counts, list(quarantine.values())))
    refuse(settings.data, results, [*records, *labels], quarantine, out)
    return Outcome(
        kind="dataset",
        result=Validation(
            records=counts,
            quarantined=dict(sorted(Counter(record["reason"] for record in quarantine.values()).items())),
            media_files=len(findings),
            media_digest=_digest(findings),
        ),
        sources=[
            File(uri=str(path), size_bytes=path.stat().st_size, sha256=file_sha256(path))
            for source in sources
            for path in files[source.name].values()
        ],
        files=(SAMPLES_FILE, LABELS_FILE, QUARANTINE_FILE, DOCS_FILE, RESULTS_FILE),
        read=external(settings.model_dump(mode="json")),
    )


def _sample(row: Row) -> dict[str, Any]:
    columns = ("id", "source", "kind", "split", "root", "media", "media_sha256", "question", "answer", "fields", "line")
    return {column: row[column] for column in columns} | {
        "conversations": json.dumps(row["conversations"], ensure_ascii=False)
    }


def _counts(sources: Sequence[Source], good: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Good rows by source and split."""
    counted = Counter((row["source"], row["split"]) for row in good)
    return {source.name: {split: counted[source.name, split] for split in (*SPLITS, "labels")} for source in sources}


def _digest(findings: Mapping[Medium, Finding]) -> str:
    """Digest over the names and digests of all media, wherever their folders lie."""
    return digest_json(sorted([medium.name, finding.sha256] for medium, finding in findings.items()))


def _summary(results: Mapping[str, Result]) -> dict[str, Any]:
    """Results without times: the same data give the same file."""
    shown = ("element_count", "missing_count", "unexpected_count", "unexpected_percent", "partial_unexpected_list")
    return {
        name: {
            "success": result.success,
            "expectations": [
                {
                    "type": configuration(each).type,
                    "kwargs": {k: v for k, v in configuration(each).kwargs.items() if k != "batch_id"},
                    "success": each.success,
                    **{key: each.result[key] for key in shown if key in each.result},
                }
                for each in result.results
            ],
        }
        for name, (_, result) in results.items()
    }


def _plain(number: Any) -> Any:
    """numpy's numbers as Python's."""
    return number.item()

"""Adds to each row what only the media themselves can tell: status, sizes, digests."""

from __future__ import annotations

from collections.abc import Sequence

from nvila.components.contracts.manifest import digest_json
from nvila.components.contracts.recipe.data import Source, Validation
from nvila.components.data.media import Limits
from nvila.components.validate.annotations import Row
from nvila.components.validate.probing import Finding, Medium, probe_all


def media_limits(limits: Validation) -> Limits:
    """What the recipe allows of a media file."""
    return Limits(
        max_pixels=limits.max_pixels,
        max_bytes=limits.max_media_bytes,
        max_seconds=limits.max_video_seconds,
        max_frames=limits.max_video_frames,
    )


def look_at_media(
    sources: Sequence[Source], records: list[Row], labels: list[Row], limits: Validation
) -> dict[Medium, Finding]:
    """Probe every file that a record or a label names, and add what was found to the rows."""
    kinds = {source.name: source.kind for source in sources}

    def named(row: Row) -> list[Medium]:
        names = row["media"] if isinstance(row["media"], list) else [row["media"]] if row["media"] is not None else []
        return [Medium(row["root"], name, kinds[row["source"]]) for name in names]

    findings = probe_all(
        [medium for row in (*records, *labels) for medium in named(row)],
        media_limits(limits),
    )
    for row in (*records, *labels):
        found = [findings[medium] for medium in named(row)]
        bad = next(((m, f) for m, f in zip(named(row), found, strict=True) if f.status != "ok"), None)
        row["media_status"] = bad[1].status if bad else "ok"
        row["media_detail"] = f"{bad[0].name}: {bad[1].detail}" if bad else ""
        row["media_sha256"] = [finding.sha256 for finding in found]
        row["side_pixels"] = None if bad else min((f.side_pixels or 0 for f in found), default=None)
        if row["split"] == "labels":
            frames = found[0].frames if found else None
            beyond = row["frame"] is not None and frames is not None and row["frame"] >= frames
            row["frame_problem"] = f"frame {row['frame']} of {frames}" if beyond else None
        else:
            told = [row["media_sha256"], row["conversations"]]
            row["content"] = None if None in row["media_sha256"] else digest_json(told)[:32]
    return findings

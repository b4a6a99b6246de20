"""Pictures in the Dagster UI: Markdown metadata with the PNG inside."""

import base64

import dagster as dg

MAX_BYTES = 100_000  # the UI keeps metadata in its database; larger pictures belong in the report


def picture(png: bytes) -> dg.MarkdownMetadataValue:
    """A PNG as Markdown metadata. Raises ValueError above MAX_BYTES."""
    if len(png) > MAX_BYTES:
        raise ValueError(f"picture of {len(png)} bytes; metadata takes at most {MAX_BYTES}")
    return dg.MetadataValue.md(f"![picture](data:image/png;base64,{base64.b64encode(png).decode()})")

"""One partition per video; the key is `video_key(relative path)`, safe as a file name and in every Dagster tag."""

import dagster as dg

video_partitions = dg.DynamicPartitionsDefinition(name="video")

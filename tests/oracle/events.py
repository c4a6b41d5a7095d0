"""Reads a run's events as TensorBoard does, and compares them with its metrics.jsonl.

    python tests/oracle/events.py runs/flowers
"""

import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

KEYS = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/val": "val_accuracy",
    "accuracy/val_top5": "val_top5",
    "macro_f1/val": "val_macro_f1",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
    "seconds": "seconds",
}


def main():
    run = Path(sys.argv[1])
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["scalars"]) == sorted(KEYS), tags["scalars"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag, key in KEYS.items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(line["epoch"], float(np.float32(line[key]))) for line in lines], tag
    for tag in tags["histograms"]:
        for event in events.Histograms(tag):
            value = event.histogram_value
            assert sum(value.bucket) == value.num and value.bucket_limit[-1] >= value.max
            assert len(value.bucket) == len(value.bucket_limit)
    for event in events.Images("confusion_matrix"):
        image = Image.open(BytesIO(event.encoded_image_string))
        assert image.size == (event.width, event.height)
    plugin = {tag: m.plugin_data.content for tag, m in events.summary_metadata.items()}
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    end = metadata.parse_session_end_info_plugin_data(plugin[metadata.SESSION_END_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(plugin[metadata.EXPERIMENT_TAG])
    names = {info.name for info in experiment.hparam_infos}
    assert names == set(start.hparams) and "learning_rate" in names and end.status == 1
    print(f"{len(lines)} epochs, {len(names)} settings, tags {tags['scalars'] + tags['histograms'] + tags['images']}")


main()

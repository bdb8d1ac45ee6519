"""What an epoch of images costs from the cache, against decoding them anew, within one run.

    python benchmarks/images.py

Both give the same uint8 batches of 48 x 48 pixels, of 1,000 drawn portraits stored as JPEG files of 200 x 200. Takes
ten seconds on two CPU cores.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from timing import Report, medians, milliseconds

from dir_toolkit.experiment.data.cache import decode_image
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.data.portraits import portraits

NUM_IMAGES, STORED, SIZE, BATCH = 1000, 200, 48, 128


def as_jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).resize((STORED, STORED)).save(file, "JPEG", quality=90)
    return file.getvalue()


def main(report: Report) -> None:
    drawn = portraits(seed=0).train
    files = [as_jpeg(image) for image in drawn.inputs[drawn.rows[:NUM_IMAGES]]]
    images = np.stack([decode_image(file, SIZE) for file in files])
    labels, rows = drawn.labels[:NUM_IMAGES], np.arange(NUM_IMAGES)
    cached = ImageSet(images, labels, rows, content_digest(images, labels, rows))
    batches = np.array_split(np.random.default_rng(0).permutation(NUM_IMAGES), NUM_IMAGES // BATCH)

    def from_cache() -> None:
        for batch in batches:
            cached.batch(batch)

    def anew() -> None:
        for batch in batches:
            np.stack([decode_image(files[i], SIZE) for i in batch])

    times = medians({"decoding": anew, "cache": from_cache}, repeats=7, warmup=1)
    what = f"epoch of images, decoding each JPEG / from the cache, {NUM_IMAGES} of {STORED} px"
    report.add(what, times["decoding"] / times["cache"], "", milliseconds(times))


if __name__ == "__main__":
    main(Report())
